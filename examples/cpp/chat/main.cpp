// chat ENGINE [STOP_TOKEN...]: a conversation that keeps its cache from turn to turn, on token ids.
//
// Each line of the input is one turn, as your tokenizer made it from the chat template: token ids with spaces
// between. Tokens are printed as they are drawn, a line a reply. Only the new turn is computed: what was said
// before stays in the cache. Ctrl-C ends a reply, and the conversation goes on.
#include <qwenport/qwenport.hpp>

#include <csignal>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

namespace {

std::shared_ptr<qwenport::Cancellation> current;  // made before the handler, replaced between replies

void interrupt(int /*signal*/) { current->request(); }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: chat ENGINE [STOP_TOKEN...] < turns\n";
    return 2;
  }
  try {
    const auto engine = qwenport::Engine::load(argv[1]);
    qwenport::Session session(engine);
    qwenport::GenerateOptions options;
    options.append = true;
    options.temperature = 0.7;
    options.top_p = 0.9;
    for (int i = 2; i < argc; ++i) options.stop_tokens.push_back(std::stoll(argv[i]));

    std::vector<qwenport::Token> pending;  // said, but not in the cache yet
    std::string line;
    while (std::getline(std::cin, line)) {
      current = std::make_shared<qwenport::Cancellation>();
      std::signal(SIGINT, interrupt);
      options.cancellation = current.get();
      std::vector<qwenport::Token> prompt = pending;
      std::istringstream words(line);
      for (qwenport::Token token = 0; words >> token;) prompt.push_back(token);
      const auto reply = session.generate(prompt, options, [](int /*row*/, qwenport::Token token) {
        std::cout << token << ' ' << std::flush;
      });
      std::cout << '\n' << std::flush;
      pending = reply.pending;
      if (reply.reason == qwenport::FinishReason::capacity) {
        std::cerr << "the cache is full; the conversation begins anew\n";
        session.reset();
        pending.clear();
      }
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

// chat ENGINE: a conversation. Each line of the input is one turn; Ctrl-C ends a reply, and the conversation goes on.
#include <qwenport/chat.hpp>

#include <csignal>
#include <iostream>

namespace {
qwenport::Cancellation stop;
}

int main(int argc, char** argv) {
  try {
    const auto engine = qwenport::Engine::load(argc > 1 ? argv[1] : "engine");
    qwenport::ChatOptions options;
    options.generate.temperature = 0.7;
    options.generate.top_p = 0.9;
    options.generate.cancellation = &stop;
    options.drop_oldest = true;
    qwenport::Chat chat(engine, options);
    std::signal(SIGINT, [](int) { stop.request(); });
    for (std::string line; std::getline(std::cin, line);) {
      stop.reset();
      chat.send(line, [](std::string_view piece) { std::cout << piece << std::flush; });
      std::cout << '\n' << std::flush;
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

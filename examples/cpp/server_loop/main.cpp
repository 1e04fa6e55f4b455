// server_loop ENGINE: requests from the input, answered by two workers at once.
//
// Each line is a prompt, token ids with spaces between; each answer is a line "request N: tokens". The two
// workers share the engine, so its weights are on the GPU once; each has a session, so a cache, of its own.
#include <qwenport/qwenport.hpp>

#include <iostream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>

namespace {

/// Lines of the standard input, numbered, for any number of threads.
class Requests {
 public:
  bool next(int& number, std::vector<qwenport::Token>& prompt) {
    const std::scoped_lock lock(mutex_);
    std::string line;
    if (!std::getline(std::cin, line)) return false;
    number = ++count_;
    prompt.clear();
    std::istringstream words(line);
    for (qwenport::Token token = 0; words >> token;) prompt.push_back(token);
    return true;
  }

  void answer(int number, const std::string& text) {
    const std::scoped_lock lock(mutex_);
    std::cout << "request " << number << ": " << text << '\n' << std::flush;
  }

 private:
  std::mutex mutex_;
  int count_ = 0;
};

/// What is wrong with one request is its answer; the loop goes on.
void serve(qwenport::Session& session, Requests& requests) {
  qwenport::GenerateOptions options;
  options.max_new_tokens = 64;
  int number = 0;
  std::vector<qwenport::Token> prompt;
  while (requests.next(number, prompt)) {
    try {
      std::ostringstream text;
      for (const auto token : session.generate(prompt, options).tokens) text << token << ' ';
      requests.answer(number, text.str());
    } catch (const qwenport::Error& error) {
      requests.answer(number, std::string("error: ") + error.what());
      if (error.code() == qwenport::ErrorCode::device) return;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: server_loop ENGINE < prompts\n";
    return 2;
  }
  try {
    const auto engine = qwenport::Engine::load(argv[1]);
    qwenport::Session first(engine);
    qwenport::Session second(engine);
    Requests requests;
    std::thread other([&] { serve(second, requests); });
    serve(first, requests);
    other.join();
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

#include <qwenport/qwenport.hpp>

#include <iostream>

int main(int argc, char** argv) {  // minimal ENGINE TOKEN...
  try {
    const auto engine = qwenport::Engine::load(argc > 1 ? argv[1] : "engine");
    qwenport::Session session(engine);
    std::vector<qwenport::Token> prompt;
    for (int i = 2; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
    qwenport::GenerateOptions options;
    options.max_new_tokens = 40;
    session.generate(prompt, options, [](int, auto token) { std::cout << token << ' ' << std::flush; });
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

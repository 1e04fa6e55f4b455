// replay DIRECTORY REQUEST: generate on a recorded engine and print what it wrote, one row a line: the reason
// and the tokens. REQUEST is a file of numbers: rows max_new_tokens temperature top_k top_p
// repetition_penalty seed, the count of stop tokens and they, then for each prompt its length and tokens.
#include <cstdio>
#include <fstream>

#include "qwenport/qwenport.hpp"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    std::ifstream file(argv[2]);
    std::size_t rows = 0;
    std::size_t count = 0;
    qwenport::GenerateOptions options;
    file >> rows >> options.max_new_tokens >> options.temperature >> options.top_k >> options.top_p >>
        options.repetition_penalty >> options.seed;
    const auto read = [&] {
      file >> count;
      std::vector<qwenport::Token> tokens(count);
      for (auto& token : tokens) file >> token;
      return tokens;
    };
    options.stop_tokens = read();
    std::vector<std::vector<qwenport::Token>> prompts(rows);
    for (auto& prompt : prompts) prompt = read();
    if (!file) return 2;
    const auto engine = qwenport::Engine::load(argv[1]);
    qwenport::SessionOptions session_options;
    session_options.max_batch = engine.info().max_batch;
    qwenport::Session session(engine, session_options);
    for (const auto& result : session.generate_batch(prompts, options)) {
      std::printf("%d", static_cast<int>(result.reason));
      for (const auto token : result.tokens) std::printf(" %lld", static_cast<long long>(token));
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

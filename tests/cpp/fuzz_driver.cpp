// fuzz_driver RUNS FILE...: mutate the files and give the results to the fuzz target.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

std::mt19937_64& generator() {
  static std::mt19937_64 one(2024);
  return one;
}

std::size_t below(std::size_t n) { return n == 0 ? 0 : generator()() % n; }

/// Mutations that keep a text nearly JSON: numbers, words and structure change places or meaning.
void mutate(std::string& text, const std::vector<std::string>& corpus) {
  static const char* const pieces[] = {
      "-1",          "0", "1e999", "9223372036854775808", "2147483648", "null", "true", "[]", "{}", "\"\"",
      R"("\u0000")", ",", ":",     "\"batch\"",           "[[[[",       "1.5",  "\xff"};
  const std::size_t at = below(text.size());
  switch (below(7)) {
    case 0:
      if (!text.empty()) text[at] = static_cast<char>(generator()());
      break;
    case 1:
      text.erase(at, 1 + below(20));
      break;
    case 2:
      text.insert(at, pieces[below(std::size(pieces))]);
      break;
    case 3: {  // a number or a word becomes another
      const std::size_t begin = text.find_first_of("0123456789\"", at);
      if (begin == std::string::npos) break;
      std::size_t end =
          text[begin] == '"' ? text.find('"', begin + 1) : text.find_first_not_of("0123456789", begin);
      if (end == std::string::npos) break;
      end += text[begin] == '"' ? 1 : 0;
      text.replace(begin, end - begin, pieces[below(std::size(pieces))]);
      break;
    }
    case 4:
      text.insert(at, text.substr(below(text.size()), below(200)));
      break;
    case 5:
      text.resize(at);
      break;
    default: {
      const std::string& other = corpus[below(corpus.size())];
      text = text.substr(0, at) + other.substr(below(other.size()));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  std::vector<std::string> corpus;
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (corpus.back().empty()) return 2;
  }
  const long runs = std::strtol(argv[1], nullptr, 10);
  for (long run = 0; run < runs; ++run) {
    std::string text = corpus[below(corpus.size())];
    for (std::size_t i = below(4); i > 0; --i) mutate(text, corpus);
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  }
  std::printf("%ld runs\n", runs);
}

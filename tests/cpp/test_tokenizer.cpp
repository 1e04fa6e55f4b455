// The tokenizer on a vocabulary of a few tokens; tests/cpp/test_tokenizer.py compares real ones with `tokenizers`.
#include <doctest/doctest.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "qwenport/tokenizer.h"
#include "qwenport/tokenizer.hpp"
#include "sha256.hpp"
#include "stand_in.hpp"

namespace {

using qwenport::Token;
using Tokens = std::vector<Token>;

void put(std::string& file, std::initializer_list<std::uint32_t> numbers) {
  for (const std::uint32_t number : numbers) {
    file.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
}

/// Tokens 0 to 255 are bytes, 256 "ab", 257 "abc", 258 "<|x|>", which is special. GPT-2's pre-tokenizer, and NFC.
std::string small_file() {
  std::string file("qwenport-tokenizer");
  file.resize(20);
  put(file, {1, 1, 5, 259, 2, 1, 1, 0, 266});
  for (std::uint32_t byte = 0; byte < 256; ++byte) put(file, {byte});
  for (std::uint32_t id = 0; id <= 256; ++id) put(file, {id});
  put(file, {258, 261, 266});
  put(file, {'a', 'b', 256, 256, 'c', 257});
  put(file, {258, 16, 261, 5});
  put(file, {258});
  for (int id = 0; id < 258; ++id) file += '\2';
  file += '\1';
  for (int byte = 0; byte < 256; ++byte) file += static_cast<char>(byte);
  return file + "ababc<|x|>";
}

/// An engine directory with a tokenizer file.
class Directory {
 public:
  explicit Directory(const std::string& file) {
    auto path = (std::filesystem::temp_directory_path() / "qwenport-XXXXXX").string();
    REQUIRE(mkdtemp(path.data()) != nullptr);
    path_ = path;
    const std::string name = "tokenizer.qwenport";
    std::string manifest = stand_in::toy_manifest_text(64, 2, 16, 97);
    const std::size_t at = manifest.find(R"("files":)");
    REQUIRE(at != std::string::npos);
    manifest.insert(manifest.find('{', at) + 1,
                    '"' + name + R"(": {"bytes": )" + std::to_string(file.size()) + R"(, "sha256": ")" +
                        qwenport::detail::sha256(file.data(), file.size()) + "\"},");
    std::ofstream(path_ + "/qwenport.json") << manifest;
    std::ofstream(path_ + "/" + name, std::ios::binary) << file;
  }
  ~Directory() { std::filesystem::remove_all(path_); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST_CASE("a text is merged, its special tokens are found, and a token is put before it") {
  const Directory directory(small_file());
  const auto tokenizer = qwenport::Tokenizer::load(directory.path());
  CHECK(tokenizer.encode("abcab<|x|>a") == Tokens{258, 257, 256, 258, 'a'});
  CHECK(tokenizer.encode("b<|x|>", {false, true}) == Tokens{'b', '<', '|', 'x', '|', '>'});
  CHECK(tokenizer.encode("", {false, false}).empty());
  CHECK(tokenizer.encode("e\u0301", {false, false}) == Tokens{0xC3, 0xA9});
  CHECK(tokenizer.encode("\xFF", {false, false}) == Tokens{0xEF, 0xBF, 0xBD});
  CHECK(tokenizer.decode({258, 256, 'c', 300, 1'000'000}) == "abc");
  CHECK(tokenizer.decode({258, 256}, false) == "<|x|>ab");
  CHECK_THROWS_WITH_AS((void)tokenizer.decode({-1}), "token -1 is negative", qwenport::Error);
}

TEST_CASE("no half character leaves a stream") {
  const Directory directory(small_file());
  const auto tokenizer = qwenport::Tokenizer::load(directory.path());
  qwenport::StreamDecoder stream(tokenizer);
  CHECK(stream.push(0xF0).empty());
  CHECK(stream.push(0x9F).empty());
  CHECK(stream.push(258).empty());
  CHECK(stream.push(0x91).empty());
  CHECK(stream.push(0x8D) == "👍");
  CHECK(stream.push(0xE2).empty());
  CHECK(stream.push('a') == "\uFFFDa");
  CHECK(stream.push(0xE2).empty());
  CHECK(stream.flush() == "\uFFFD");
  CHECK(stream.flush().empty());
}

TEST_CASE("threads share a tokenizer") {
  const Directory directory(small_file());
  const auto tokenizer = qwenport::Tokenizer::load(directory.path());
  std::array<Tokens, 4> found;
  std::vector<std::thread> threads;
  threads.reserve(found.size());
  for (Tokens& tokens : found) {
    threads.emplace_back([&tokens, &tokenizer] {
      for (int i = 0; i < 200; ++i) tokens = tokenizer.encode("abc don't e\u0301 123 <|x|> \n  ab");
      (void)tokenizer.decode(tokens);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Tokens& tokens : found) CHECK(tokens == found[0]);
}

TEST_CASE("the C API does the same, and refuses NULL by name") {
  const Directory directory(small_file());
  qwenport_tokenizer* tokenizer = nullptr;
  REQUIRE(qwenport_tokenizer_load(directory.path().c_str(), &tokenizer) == 0);
  int64_t* tokens = nullptr;
  size_t count = 0;
  REQUIRE(qwenport_tokenizer_encode(tokenizer, "abc", 3, nullptr, &tokens, &count) == 0);
  CHECK(Tokens(tokens, tokens + count) == Tokens{258, 257});
  char* text = nullptr;
  size_t bytes = 0;
  REQUIRE(qwenport_tokenizer_decode(tokenizer, tokens, count, 0, &text, &bytes) == 0);
  CHECK(std::string(text) == "<|x|>abc");
  CHECK(bytes == 8);
  qwenport_text_free(text);
  qwenport_tokens_free(tokens);

  const auto refused = [](int code, const char* message) {
    CHECK(code == QWENPORT_INVALID_ARGUMENT);
    CHECK(std::string(qwenport_last_error()) == message);
  };
  refused(qwenport_tokenizer_load(nullptr, &tokenizer), "directory is NULL");
  refused(qwenport_tokenizer_load("x", nullptr), "tokenizer is NULL");
  refused(qwenport_tokenizer_encode(nullptr, "", 0, nullptr, &tokens, &count), "tokenizer is NULL");
  refused(qwenport_tokenizer_encode(tokenizer, nullptr, 1, nullptr, &tokens, &count), "text is NULL");
  refused(qwenport_tokenizer_encode(tokenizer, "", 0, nullptr, nullptr, &count), "tokens is NULL");
  refused(qwenport_tokenizer_encode(tokenizer, "", 0, nullptr, &tokens, nullptr), "count is NULL");
  refused(qwenport_tokenizer_decode(tokenizer, nullptr, 1, 0, &text, &bytes), "tokens is NULL");
  refused(qwenport_tokenizer_decode(tokenizer, nullptr, 0, 0, nullptr, &bytes), "text is NULL");
  refused(qwenport_tokenizer_decode(tokenizer, nullptr, 0, 0, &text, nullptr), "bytes is NULL");
  qwenport_stream_decoder* stream = nullptr;
  refused(qwenport_stream_decoder_create(nullptr, 1, &stream), "tokenizer is NULL");
  refused(qwenport_stream_decoder_create(tokenizer, 1, nullptr), "decoder is NULL");
  REQUIRE(qwenport_stream_decoder_create(tokenizer, 1, &stream) == 0);
  qwenport_tokenizer_free(tokenizer);
  const char* piece = nullptr;
  REQUIRE(qwenport_stream_decoder_push(stream, 257, &piece, &bytes) == 0);
  CHECK(std::string(piece) == "abc");
  refused(qwenport_stream_decoder_push(stream, -1, &piece, &bytes), "token -1 is negative");
  refused(qwenport_stream_decoder_push(nullptr, 1, &piece, &bytes), "decoder is NULL");
  refused(qwenport_stream_decoder_flush(stream, nullptr, &bytes), "text is NULL");
  REQUIRE(qwenport_stream_decoder_flush(stream, &piece, &bytes) == 0);
  CHECK(bytes == 0);
  qwenport_stream_decoder_free(stream);
}

}  // namespace

// The tokenizer on a vocabulary of a few tokens; tests/cpp/test_tokenizer.py compares real ones with `tokenizers`.
#include <doctest/doctest.h>

#include <array>
#include <thread>

#include "qwenport/tokenizer.h"
#include "qwenport/tokenizer.hpp"
#include "small_engine.hpp"

namespace {

using qwenport::Token;
using stand_in::Directory;
using stand_in::small_tokenizer;
using Tokens = std::vector<Token>;

TEST_CASE("a text is merged, its special tokens are found, and a token is put before it") {
  const Directory directory(small_tokenizer());
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
  const Directory directory(small_tokenizer());
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
  const Directory directory(small_tokenizer());
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
  const Directory directory(small_tokenizer());
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

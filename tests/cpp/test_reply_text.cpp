// The text of replies and their stop strings, against a search through the whole text.
#include <doctest/doctest.h>

#include <algorithm>

#include "chat/reply_text.hpp"
#include "small_engine.hpp"

namespace {

using qwenport::Token;
using qwenport::Tokenizer;
using qwenport::detail::ReplyText;
using Tokens = std::vector<Token>;
using Strings = std::vector<std::string>;

std::vector<Tokens> bytes_of(const Strings& strings) {
  std::vector<Tokens> all;
  for (const std::string& text : strings) {
    all.emplace_back();
    for (const char byte : text) all.back().push_back(static_cast<unsigned char>(byte));
  }
  return all;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

struct Found {
  std::string text;
  int stop = -1;
};

/// The definition: character by character, the first that completes a stop string; of several the longest.
Found searched(const std::string& text, const Strings& stops) {
  for (std::size_t end = 0; end <= text.size(); ++end) {
    const std::string begun = text.substr(0, end);
    Found found;
    std::size_t longest = 0;
    for (std::size_t i = 0; i < stops.size(); ++i) {
      if (ends_with(begun, stops[i]) && stops[i].size() > longest) {
        longest = stops[i].size();
        found = {begun.substr(0, end - longest), static_cast<int>(i)};
      }
    }
    if (found.stop >= 0) return found;
  }
  return {text, -1};
}

/// The longest end of a text that may become a stop string.
std::size_t undecided(const std::string& text, const Strings& stops) {
  std::size_t most = 0;
  for (const std::string& stop : stops) {
    for (std::size_t size = 1; size < stop.size(); ++size) {
      if (ends_with(text, stop.substr(0, size))) most = std::max(most, size);
    }
  }
  return most;
}

/// Give a reply its tokens one by one, and compare all of it with the definition.
void check(const Tokenizer& tokenizer, const Tokens& tokens, const Strings& stops) {
  const auto bytes = bytes_of(stops);
  const std::string whole = tokenizer.decode(tokens);
  const Found expected = searched(whole, stops);
  ReplyText reply(tokenizer, bytes);
  std::string streamed;
  for (std::size_t i = 0; i < tokens.size() && reply.stop() < 0; ++i) {
    streamed += reply.push(tokens[i]);
    if (reply.stop() >= 0) break;
    const std::string begun = tokenizer.decode({tokens.begin(), tokens.begin() + static_cast<long>(i) + 1});
    CHECK(streamed == begun.substr(0, begun.size() - undecided(begun, stops)));
  }
  streamed += reply.finish();
  CHECK(streamed == expected.text);
  CHECK(reply.text() == expected.text);
  CHECK(reply.stop() == expected.stop);
}

}  // namespace

TEST_CASE("however a text is split into tokens, stop strings end it where the definition does") {
  const stand_in::Directory directory(stand_in::small_tokenizer());
  const auto tokenizer = Tokenizer::load(directory.path());
  const Tokens alphabet{'a', 'b', 256, 257, 258};  // of them, "ab", "abc" and a special token
  const std::vector<Strings> all_stops{
      {}, {"b"}, {"aab"}, {"abab", "ba"}, {"bab", "ab", "cab"}, {"aa", "baa"}, {"ab", "ab"}};
  for (std::size_t length = 0; length <= 5; ++length) {
    Tokens tokens(length, 0);
    std::size_t count = 1;
    for (std::size_t i = 0; i < length; ++i) count *= alphabet.size();
    for (std::size_t number = 0; number < count; ++number) {
      std::size_t rest = number;
      for (Token& token : tokens) {
        token = alphabet[rest % alphabet.size()];
        rest /= alphabet.size();
      }
      for (const Strings& stops : all_stops) check(tokenizer, tokens, stops);
    }
  }
}

TEST_CASE("a stop string may be of characters that several tokens make, and of what replaces invalid bytes") {
  const stand_in::Directory directory(stand_in::small_tokenizer());
  const auto tokenizer = Tokenizer::load(directory.path());
  const auto found = [&](const Tokens& tokens, const Strings& stops) {
    const auto bytes = bytes_of(stops);
    ReplyText reply(tokenizer, bytes);
    std::string streamed;
    for (const Token token : tokens) {
      if (reply.stop() < 0) streamed += reply.push(token);
    }
    streamed += reply.finish();
    CHECK(streamed == reply.text());
    return streamed + "|" + std::to_string(reply.stop());
  };
  CHECK(found({'x', 0xC3, 0xA9, 'y'}, {"\u00E9"}) == "x|0");
  CHECK(found({'x', 0xC3, 0xA8, 'y'}, {"\u00E9"}) == "x\u00E8y|-1");
  CHECK(found({0xF0, 0x9F, 0x91, 0x8D, 0xF0, 0x9F, 0x91, 0x8E}, {"\U0001F44E"}) == "\U0001F44D|0");
  CHECK(found({'x', 0xFF, 'y'}, {"\uFFFD"}) == "x|0");
  CHECK(found({'x', 0xC3, 'y'}, {"\uFFFD"}) == "x|0");
  CHECK(found({'x', 0xC3}, {"\uFFFD"}) == "x|0");  // what the end replaces is searched too
  CHECK(found({'x', 0xC3}, {"x\uFFFDy"}) == "x\uFFFD|-1");
  CHECK(found({'x', 257, 'y'}, {"b"}) == "xa|0");  // in the middle of a token
}

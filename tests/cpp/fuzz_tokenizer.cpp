// Whatever a text's bytes are, its tokens decode to UTF-8, at once and one by one alike. The tokenizer is that of the engine
// directory in the environment's QWENPORT_FUZZ_ENGINE.
#include <cstdint>
#include <cstdlib>

#include "qwenport/tokenizer.hpp"
#include "tokenizer/unicode.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto tokenizer = qwenport::Tokenizer::load(std::getenv("QWENPORT_FUZZ_ENGINE"));  // NOLINT
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto expect = [](bool holds) {
    if (!holds) std::abort();
  };
  for (const bool split : {false, true}) {
    const auto tokens = tokenizer.encode(text, {/*add_special_tokens=*/true, split});
    for (const bool skip : {false, true}) {
      qwenport::StreamDecoder stream(tokenizer, skip);
      std::string streamed;
      for (const qwenport::Token token : tokens) {
        const std::string piece = stream.push(token);
        expect(qwenport::detail::is_valid_utf8(piece));
        streamed += piece;
      }
      streamed += stream.flush();
      expect(streamed == tokenizer.decode(tokens, skip) && qwenport::detail::is_valid_utf8(streamed));
    }
  }
  return 0;
}

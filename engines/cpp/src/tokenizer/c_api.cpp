// The C API of the tokenizer.
#include "qwenport/tokenizer.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "c_guard.hpp"
#include "c_types.hpp"
#include "qwenport/tokenizer.hpp"

struct qwenport_tokenizer {
  qwenport::Tokenizer tokenizer;
};

struct qwenport_stream_decoder {
  qwenport::StreamDecoder decoder;
  std::string text;  // of the last call
};

namespace {

using qwenport::detail::copied;
using qwenport::detail::guarded;
using qwenport::detail::need;

void put_text(qwenport_stream_decoder& decoder, std::string piece, const char** text, size_t* bytes) {
  decoder.text = std::move(piece);
  *text = decoder.text.c_str();
  *bytes = decoder.text.size();
}

}  // namespace

extern "C" {

int qwenport_tokenizer_load(const char* directory, qwenport_tokenizer** tokenizer) {
  return guarded([&] {
    need({{"directory", directory}, {"tokenizer", tokenizer}});
    *tokenizer = new qwenport_tokenizer{qwenport::Tokenizer::load(directory)};
  });
}

void qwenport_tokenizer_free(qwenport_tokenizer* tokenizer) { delete tokenizer; }

qwenport_encode_options qwenport_encode_defaults(void) {
  const qwenport::EncodeOptions options;
  return {options.add_special_tokens ? 1 : 0, options.split_special_tokens ? 1 : 0};
}

int qwenport_tokenizer_encode(const qwenport_tokenizer* tokenizer, const char* text, size_t bytes,
                              const qwenport_encode_options* options, int64_t** tokens, size_t* count) {
  return guarded([&] {
    need({{"tokenizer", tokenizer}, {"tokens", tokens}, {"count", count}});
    if (bytes != 0) need({{"text", text}});
    const qwenport_encode_options given = options != nullptr ? *options : qwenport_encode_defaults();
    const std::vector<qwenport::Token> made =
        tokenizer->tokenizer.encode(bytes == 0 ? std::string_view() : std::string_view(text, bytes),
                                    {given.add_special_tokens != 0, given.split_special_tokens != 0});
    *tokens = copied(made.data(), made.size());
    *count = made.size();
  });
}

void qwenport_tokens_free(int64_t* tokens) { std::free(tokens); }

int qwenport_tokenizer_decode(const qwenport_tokenizer* tokenizer, const int64_t* tokens, size_t count,
                              int skip_special_tokens, char** text, size_t* bytes) {
  return guarded([&] {
    need({{"tokenizer", tokenizer}, {"text", text}, {"bytes", bytes}});
    if (count != 0) need({{"tokens", tokens}});
    std::vector<qwenport::Token> given;
    if (count != 0) given.assign(tokens, tokens + count);
    const std::string made = tokenizer->tokenizer.decode(given, skip_special_tokens != 0);
    *text = copied(made.data(), made.size());
    *bytes = made.size();
  });
}

void qwenport_text_free(char* text) { std::free(text); }

int qwenport_stream_decoder_create(const qwenport_tokenizer* tokenizer, int skip_special_tokens,
                                   qwenport_stream_decoder** decoder) {
  return guarded([&] {
    need({{"tokenizer", tokenizer}, {"decoder", decoder}});
    *decoder = new qwenport_stream_decoder{
        qwenport::StreamDecoder(tokenizer->tokenizer, skip_special_tokens != 0), ""};
  });
}

void qwenport_stream_decoder_free(qwenport_stream_decoder* decoder) { delete decoder; }

int qwenport_stream_decoder_push(qwenport_stream_decoder* decoder, int64_t token, const char** text,
                                 size_t* bytes) {
  return guarded([&] {
    need({{"decoder", decoder}, {"text", text}, {"bytes", bytes}});
    put_text(*decoder, decoder->decoder.push(token), text, bytes);
  });
}

int qwenport_stream_decoder_flush(qwenport_stream_decoder* decoder, const char** text, size_t* bytes) {
  return guarded([&] {
    need({{"decoder", decoder}, {"text", text}, {"bytes", bytes}});
    put_text(*decoder, decoder->decoder.flush(), text, bytes);
  });
}

}  // extern "C"

/* Text to token ids and back, for C: the counterpart of tokenizer.hpp. The rules are those of qwenport.h.
 *
 *     qwenport_tokenizer* tokenizer = NULL;
 *     int64_t* tokens = NULL;
 *     size_t count = 0;
 *     if (qwenport_tokenizer_load("engine", &tokenizer) ||
 *         qwenport_tokenizer_encode(tokenizer, "Once upon a time", 16, NULL, &tokens, &count)) {
 *       fprintf(stderr, "error: %s\n", qwenport_last_error());
 *     }
 *     qwenport_tokens_free(tokens);
 *     qwenport_tokenizer_free(tokenizer);
 */
#ifndef QWENPORT_TOKENIZER_H
#define QWENPORT_TOKENIZER_H

#include <qwenport/qwenport.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qwenport_tokenizer qwenport_tokenizer;
typedef struct qwenport_stream_decoder qwenport_stream_decoder;

/** See EncodeOptions in tokenizer.hpp. */
typedef struct {
  int add_special_tokens;   /**< 1: put BOS and the like around the text */
  int split_special_tokens; /**< 1: special tokens in the text are text */
} qwenport_encode_options;

/** Load the tokenizer of an engine directory. */
QWENPORT_EXPORT int qwenport_tokenizer_load(const char* directory, qwenport_tokenizer** tokenizer);
/** Stream decoders of the tokenizer stay valid. */
QWENPORT_EXPORT void qwenport_tokenizer_free(qwenport_tokenizer* tokenizer);

QWENPORT_EXPORT qwenport_encode_options qwenport_encode_defaults(void);
/** The tokens of `bytes` bytes of UTF-8. options may be NULL for the defaults, text if bytes is 0. Free *tokens with
 *  qwenport_tokens_free. */
QWENPORT_EXPORT int qwenport_tokenizer_encode(const qwenport_tokenizer* tokenizer, const char* text,
                                              size_t bytes, const qwenport_encode_options* options,
                                              int64_t** tokens, size_t* count);
QWENPORT_EXPORT void qwenport_tokens_free(int64_t* tokens);

/** The text of tokens: UTF-8 of *bytes bytes, and a zero behind them. tokens may be NULL if count is 0. Free *text with
 *  qwenport_text_free. */
QWENPORT_EXPORT int qwenport_tokenizer_decode(const qwenport_tokenizer* tokenizer, const int64_t* tokens,
                                              size_t count, int skip_special_tokens, char** text,
                                              size_t* bytes);
QWENPORT_EXPORT void qwenport_text_free(char* text);

QWENPORT_EXPORT int qwenport_stream_decoder_create(const qwenport_tokenizer* tokenizer,
                                                   int skip_special_tokens,
                                                   qwenport_stream_decoder** decoder);
QWENPORT_EXPORT void qwenport_stream_decoder_free(qwenport_stream_decoder* decoder);
/** Append a token; *text is the text that is now certain, *bytes bytes and a zero, valid until the decoder's next call. */
QWENPORT_EXPORT int qwenport_stream_decoder_push(qwenport_stream_decoder* decoder, int64_t token,
                                                 const char** text, size_t* bytes);
/** End the text: what was held back. Then start anew. */
QWENPORT_EXPORT int qwenport_stream_decoder_flush(qwenport_stream_decoder* decoder, const char** text,
                                                  size_t* bytes);

#ifdef __cplusplus
}
#endif

#endif

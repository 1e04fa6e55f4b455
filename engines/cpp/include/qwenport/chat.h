/* A conversation with a chat model, for C: the counterpart of chat.hpp. The rules are those of qwenport.h.
 *
 *     #include <qwenport/chat.h>
 *     #include <stdio.h>
 *
 *     static void print(void* user, const char* text, size_t bytes) {
 *       (void)user;
 *       fwrite(text, 1, bytes, stdout);
 *       fflush(stdout);
 *     }
 *
 *     int main(void) {
 *       qwenport_engine* engine = NULL;
 *       qwenport_chat* chat = NULL;
 *       if (qwenport_engine_load("engine", NULL, &engine) || qwenport_chat_create(engine, NULL, &chat) ||
 *           qwenport_chat_send(chat, "Hello!", 6, print, NULL, NULL)) {
 *         fprintf(stderr, "error: %s\n", qwenport_last_error());
 *         return 2;
 *       }
 *       qwenport_chat_free(chat);
 *       qwenport_engine_free(engine);
 *     }
 */
#ifndef QWENPORT_CHAT_H
#define QWENPORT_CHAT_H

#include <qwenport/tokenizer.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qwenport_chat_format qwenport_chat_format;
typedef struct qwenport_chat qwenport_chat;

/** See Message in chat.hpp. */
typedef struct {
  const char* role;    /**< ends with a zero */
  const char* content; /**< UTF-8; may be NULL if bytes is 0 */
  size_t bytes;        /**< of the content */
} qwenport_message;

/** Load the chat format of an engine directory. */
QWENPORT_EXPORT int qwenport_chat_format_load(const char* directory, qwenport_chat_format** format);
QWENPORT_EXPORT void qwenport_chat_format_free(qwenport_chat_format* format);
/** The text of `count` messages, UTF-8 of *bytes bytes and a zero behind them; see ChatFormat::text. Free *text with
 *  qwenport_text_free. */
QWENPORT_EXPORT int qwenport_chat_format_text(const qwenport_chat_format* format,
                                              const qwenport_message* messages, size_t count, char** text,
                                              size_t* bytes);

/** See ChatOptions in chat.hpp. */
typedef struct {
  const char*
      system; /**< the system message, which ends with a zero; NULL: what the template says without one */
  qwenport_generate_options generate; /**< its on_logits gets the `user` of qwenport_chat_send */
  const char* const* stop_strings;    /**< each ends with a zero; may be NULL if stop_string_count is 0 */
  size_t stop_string_count;
  int drop_oldest; /**< 1: old turns leave the conversation when there is little room */
  qwenport_session_options session;
} qwenport_chat_options;

/** See Reply in chat.hpp. */
typedef struct {
  const char* text; /**< UTF-8 of `bytes` bytes, and a zero behind them; valid until the chat's next call */
  size_t bytes;
  int reason;      /**< QWENPORT_FINISH_... */
  int stop_string; /**< the index of the one that ended it, or -1 */
  int prompt_tokens;
  int new_tokens;
  int dropped;
} qwenport_reply;

/** Called with the reply's text, piece by piece: UTF-8 of `bytes` bytes without a zero behind them, never 0. Must not throw or
 *  longjmp, nor free the chat; may request cancellation. A call of qwenport_chat_send or _reset for this chat changes
 *  nothing and returns QWENPORT_INVALID_ARGUMENT; so does qwenport_chat_send after the callback. */
typedef void (*qwenport_on_text)(void* user, const char* text, size_t bytes);

QWENPORT_EXPORT qwenport_chat_options qwenport_chat_defaults(void);
/** options may be NULL for the defaults. What they point to is copied, but for the cancellation, which must outlive the
 *  chat. */
QWENPORT_EXPORT int qwenport_chat_create(const qwenport_engine* engine, const qwenport_chat_options* options,
                                         qwenport_chat** chat);
QWENPORT_EXPORT void qwenport_chat_free(qwenport_chat* chat);
/** The user's turn, and the model's reply to it; see Chat::send. content may be NULL if bytes is 0; on_text, user and reply
 *  may be NULL. */
QWENPORT_EXPORT int qwenport_chat_send(qwenport_chat* chat, const char* content, size_t bytes,
                                       qwenport_on_text on_text, void* user, qwenport_reply* reply);
/** What the user and the model have said, without the system message: *count messages, valid until the chat's next
 *  call. */
QWENPORT_EXPORT int qwenport_chat_history(qwenport_chat* chat, const qwenport_message** messages,
                                          size_t* count);
/** Begin anew. */
QWENPORT_EXPORT int qwenport_chat_reset(qwenport_chat* chat);

#ifdef __cplusplus
}
#endif

#endif

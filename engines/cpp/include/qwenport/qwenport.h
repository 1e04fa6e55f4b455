/* Qwenport's runtime for C, and for languages that bind to C. The counterpart of qwenport.hpp: same objects,
 * same rules, same thread-safety contract; an exception there is a returned error code here.
 *
 *     #include <qwenport/qwenport.h>
 *     #include <stdio.h>
 *
 *     int main(void) {
 *       qwenport_engine* engine = NULL;
 *       qwenport_session* session = NULL;
 *       int64_t prompt[] = {785, 3974, 13876}, tokens[40];
 *       const int64_t* prompts[] = {prompt};
 *       size_t sizes[] = {3};
 *       qwenport_generate_options options = qwenport_generate_defaults();
 *       qwenport_generated result;
 *       options.max_new_tokens = 40;
 *       if (qwenport_engine_load("engine", NULL, &engine) || qwenport_session_create(engine, NULL, &session) ||
 *           qwenport_generate(session, prompts, sizes, 1, &options, NULL, NULL, tokens, &result, NULL)) {
 *         fprintf(stderr, "error: %s\n", qwenport_last_error());
 *         return 2;
 *       }
 *       for (size_t i = 0; i < result.count; ++i) printf("%lld\n", (long long)tokens[i]);
 *       qwenport_session_free(session);
 *       qwenport_engine_free(engine);
 *     }
 *
 * Every function that returns int returns 0, or an error code with a message in qwenport_last_error; those that return a
 * value of a session are marked. No argument may be NULL unless said so: that is QWENPORT_INVALID_ARGUMENT with the
 * argument's name. Functions that return void do nothing with NULL. Free sessions and engines before main returns.
 */
#ifndef QWENPORT_QWENPORT_H
#define QWENPORT_QWENPORT_H

#include <stddef.h>
#include <stdint.h>

#include <qwenport/export.h>

#ifdef __cplusplus
extern "C" {
#endif

/** A token id that leaves its row alone in qwenport_session_decode. */
#define QWENPORT_IDLE (-1)

/** Error codes; see ErrorCode in qwenport.hpp. */
enum {
  QWENPORT_INVALID_ARGUMENT = 1,
  QWENPORT_BAD_ENGINE = 2,
  QWENPORT_MISSING_LIBRARY = 3,
  QWENPORT_WRONG_GPU = 4,
  QWENPORT_WRONG_VERSION = 5,
  QWENPORT_CAPACITY = 6,
  QWENPORT_SAMPLING = 7,
  QWENPORT_BAD_SNAPSHOT = 8,
  QWENPORT_DEVICE = 9,
  QWENPORT_INTERNAL = 10,
  QWENPORT_NOT_PROVEN = 11
};

/** Why a row ended. */
enum {
  QWENPORT_FINISH_STOP = 0,
  QWENPORT_FINISH_LENGTH = 1, /**< max_new_tokens; also if the cache is full at the same time */
  QWENPORT_FINISH_CAPACITY = 2,
  QWENPORT_FINISH_CANCELLED = 3
};

typedef struct qwenport_engine qwenport_engine;
typedef struct qwenport_session qwenport_session;
typedef struct qwenport_cancellation qwenport_cancellation;

/** Facts from an engine's manifest. The strings live as long as the engine. */
typedef struct {
  int vocab_size;
  int capacity;        /**< cache slots per row */
  int max_batch;       /**< rows */
  int max_step_tokens; /**< tokens per row and step */
  const char* dtype;
  const char* flavour;
  const char* runtime_version;
  const char* gpus; /**< "sm80,sm90"; "" for onnxruntime */
  size_t cache_bytes_per_row;
  int has_proof;           /**< 1: it carries what qwenport_engine_self_test compares with */
  const char* weights;     /**< how quantized weights are stored, in words; else the dtype */
  const char* activations; /**< the dtype; "int8" or "fp8" if quantized products round them to it */
} qwenport_engine_info;

/** How onnxruntime loads an engine; see LoadMode in qwenport.hpp. */
enum { QWENPORT_LOAD_FAST_STEPS = 0, QWENPORT_LOAD_FAST_START = 1 };

/** What does not apply to the engine's flavour is ignored. */
typedef struct {
  int gpu;                 /**< TensorRT: CUDA device number */
  int threads;             /**< onnxruntime: CPU threads of a step, at most 1024; 0 lets onnxruntime choose */
  int load;                /**< onnxruntime: QWENPORT_LOAD_... */
  const char* onnxruntime; /**< the onnxruntime library; NULL: where EngineOptions in qwenport.hpp says */
  int require_self_test;   /**< 1: make no session until qwenport_engine_self_test has passed here */
} qwenport_engine_options;

/** What a self-test found; see SelfTestReport in qwenport.hpp. */
typedef struct {
  int passed;
  int cases;
  int skipped;
  int steps;
  int marks;
  int remembered;
  double seconds;
  int call; /**< this and the following, up to case_name: the first wrong row of logits, if it has not passed */
  int row;
  int position;
  int span;
  double error;
  double bound;
  char case_name[64]; /**< cut to its size, as summary is */
  char summary[256];  /**< one line */
} qwenport_self_test_report;

typedef struct {
  int max_batch;   /**< rows */
  int capacity;    /**< usable slots per row; 0 means the engine's capacity */
  int cuda_graphs; /**< 1: replay single-token steps as CUDA graphs; only TensorRT does */
} qwenport_session_options;

/** Called before each token is drawn, with the `user` that qwenport_generate was given; see OnLogits in qwenport.hpp. It
 *  may edit the logits, fp32 [vocab_size]; -INFINITY bans a token. tokens are the `count` that the row has drawn so far.
 *  Both are valid during the call. Must not throw or longjmp; may request cancellation. A call that uses the session, any but
 *  qwenport_session_lengths, _max_batch, _capacity and _cuda_graphs, changes nothing and returns QWENPORT_INVALID_ARGUMENT
 *  (qwenport_session_reset, which returns nothing, too does nothing); so does qwenport_generate after the callback. A
 *  session that is freed here lives until its generation has ended. */
typedef void (*qwenport_on_logits)(void* user, int row, float* logits, size_t vocab_size,
                                   const int64_t* tokens, size_t count);

typedef struct {
  int max_new_tokens;         /**< also the number of columns of qwenport_generate's tokens */
  const int64_t* stop_tokens; /**< may be NULL if stop_token_count is 0 */
  size_t stop_token_count;
  const int64_t* const* stop_sequences; /**< none empty; may be NULL if stop_sequence_count is 0 */
  const size_t* stop_sequence_sizes;    /**< the same */
  size_t stop_sequence_count;
  double temperature;        /**< 0, which is greedy, or in [1e-30, 1e30] */
  int64_t top_k;             /**< 0 keeps all */
  double top_p;              /**< in [0, 1]; 1 keeps all */
  double repetition_penalty; /**< in [1e-30, 1e30]; 1 is off */
  uint64_t seed;
  int append; /**< 1: continue after the tokens that the rows hold; 0: reset the session */
  const qwenport_cancellation* cancellation; /**< may be NULL */
  qwenport_on_logits on_logits;              /**< may be NULL */
  /** How many of the most likely tokens get log-probabilities besides each new token itself; -1: there are none. See
   *  GenerateOptions in qwenport.hpp. */
  int logprobs;
} qwenport_generate_options;

typedef struct {
  size_t count;       /**< new tokens, the stop token or stop sequence not counted */
  int reason;         /**< QWENPORT_FINISH_... */
  int64_t stop_token; /**< the one that was drawn, or -1 */
  int stop_sequence;  /**< the index of the one that was drawn, or -1 */
  /** How many of prompt, new tokens and stop token or stop sequence, from the end, the cache does not hold: begin
   *  the next prompt with them to go on with `append`. */
  size_t pending;
} qwenport_generated;

/** Where qwenport_generate writes log-probabilities, with k = the option `logprobs`. Of row b the first
 *  results[b].count columns are written. */
typedef struct {
  float* logprobs;     /**< fp32 [count, max_new_tokens]: of the new tokens */
  int64_t* top_tokens; /**< int64 [count, max_new_tokens, k], highest first; may be NULL if k is 0 */
  float* top_logprobs; /**< fp32, theirs; may be NULL if k is 0 */
} qwenport_logprobs;

/** Called for each new token, with the `user` that qwenport_generate was given; see OnToken in qwenport.hpp. Must not throw or
 *  longjmp; may request cancellation. A call that uses the session does what qwenport_on_logits says. */
typedef void (*qwenport_on_token)(void* user, int row, int64_t token);

/** This thread's last error message: one line that says what to do. Valid until the thread's next call. */
QWENPORT_EXPORT const char* qwenport_last_error(void);

QWENPORT_EXPORT qwenport_engine_options qwenport_engine_defaults(void);
/** Load an engine directory with the runtime that it was built for. options may be NULL for the defaults. */
QWENPORT_EXPORT int qwenport_engine_load(const char* directory, const qwenport_engine_options* options,
                                         qwenport_engine** engine);
/** Free the handle. Sessions of the engine stay valid. */
QWENPORT_EXPORT void qwenport_engine_free(qwenport_engine* engine);
/** All zero if engine is NULL. */
QWENPORT_EXPORT qwenport_engine_info qwenport_engine_get_info(const qwenport_engine* engine);

/** Run the vectors that the engine carries; see Engine::self_test in qwenport.hpp. Returns 0 if they have run: whether they
 *  passed is in the report. */
QWENPORT_EXPORT int qwenport_engine_self_test(const qwenport_engine* engine,
                                              qwenport_self_test_report* report);

QWENPORT_EXPORT qwenport_session_options qwenport_session_defaults(void);
/** options may be NULL for the defaults. */
QWENPORT_EXPORT int qwenport_session_create(const qwenport_engine* engine,
                                            const qwenport_session_options* options,
                                            qwenport_session** session);
QWENPORT_EXPORT void qwenport_session_free(qwenport_session* session);

/** Append sizes[b] tokens rows[b] to row b; if sizes[b] is 0, rows[b] is not read and may be NULL.
 *  prompt_lengths, which may be NULL, are for prompts that are given in several calls; see Session::prefill in qwenport.hpp:
 *  prompt_lengths[b] is how many tokens row b will hold when its whole prompt is there, by default after this call.
 *  logits[b] becomes the fp32 [vocab_size] after its last token, or NULL for a row that was given none; valid
 *  until the next call. */
QWENPORT_EXPORT int qwenport_session_prefill(qwenport_session* session, const int64_t* const* rows,
                                             const size_t* sizes, const int* prompt_lengths, size_t count,
                                             const float** logits);
/** Append one token per row, or none (QWENPORT_IDLE). logits as for prefill. */
QWENPORT_EXPORT int qwenport_session_decode(qwenport_session* session, const int64_t* tokens, size_t count,
                                            const float** logits);

QWENPORT_EXPORT qwenport_generate_options qwenport_generate_defaults(void);
/** Reset (unless append), prefill `count` prompts and decode until all have ended.
 *  options (for the defaults), on_token and user may be NULL. No prompt may be empty. tokens is int64 [count,
 *  max_new_tokens]; of row b the first results[b].count are written. results is [count]. logprobs is NULL if, and only
 *  if, the option of that name is -1. */
QWENPORT_EXPORT int qwenport_generate(qwenport_session* session, const int64_t* const* prompts,
                                      const size_t* sizes, size_t count,
                                      const qwenport_generate_options* options, qwenport_on_token on_token,
                                      void* user, int64_t* tokens, qwenport_generated* results,
                                      const qwenport_logprobs* logprobs);

/** Forget all tokens. During a generation of the session: see qwenport_on_logits. */
QWENPORT_EXPORT void qwenport_session_reset(qwenport_session* session);
/** Keep the first `length` tokens of a row. */
QWENPORT_EXPORT int qwenport_session_truncate(qwenport_session* session, int length, int row);
/** Write the tokens that each of the max_batch rows holds. */
QWENPORT_EXPORT int qwenport_session_lengths(const qwenport_session* session, int* lengths);
/** A value, as are the next two; -1 if session is NULL. */
QWENPORT_EXPORT int qwenport_session_max_batch(const qwenport_session* session);
QWENPORT_EXPORT int qwenport_session_capacity(const qwenport_session* session);
/** 1 or 0: whether single-token steps are replayed as CUDA graphs. */
QWENPORT_EXPORT int qwenport_session_cuda_graphs(const qwenport_session* session);

/** The cache's content; free it with qwenport_snapshot_free. */
QWENPORT_EXPORT int qwenport_session_save(const qwenport_session* session, void** snapshot, size_t* bytes);
QWENPORT_EXPORT int qwenport_session_restore(qwenport_session* session, const void* snapshot, size_t bytes);
QWENPORT_EXPORT void qwenport_snapshot_free(void* snapshot);

/** Returns NULL if out of memory. */
QWENPORT_EXPORT qwenport_cancellation* qwenport_cancellation_create(void);
/** May be called from any thread, and from a signal handler. */
QWENPORT_EXPORT void qwenport_cancellation_request(qwenport_cancellation* cancellation);
/** Before it serves the next generation. */
QWENPORT_EXPORT void qwenport_cancellation_reset(qwenport_cancellation* cancellation);
/** Must not be called while a generation uses it. */
QWENPORT_EXPORT void qwenport_cancellation_free(qwenport_cancellation* cancellation);

#ifdef __cplusplus
}
#endif

#endif

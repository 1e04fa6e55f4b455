// What C gives as structs of pointers, as the C++ API takes it.
#include <string>

#include "c_guard.hpp"
#include "c_types.hpp"

namespace qwenport::detail {

std::vector<std::vector<Token>> rows_of(const int64_t* const* rows, const size_t* sizes, size_t count,
                                        const std::string& name) {
  std::vector<std::vector<Token>> all(count);
  for (size_t b = 0; b < count; ++b) {
    if (sizes[b] == 0) continue;
    need({{name + "[" + std::to_string(b) + "]", rows[b]}});
    all[b].assign(rows[b], rows[b] + sizes[b]);
  }
  return all;
}

GenerateOptions options_of(const qwenport_generate_options& given, void* const* user) {
  GenerateOptions options;
  options.max_new_tokens = given.max_new_tokens;
  if (given.stop_token_count != 0) {
    need({{"options.stop_tokens", given.stop_tokens}});
    options.stop_tokens.assign(given.stop_tokens, given.stop_tokens + given.stop_token_count);
  }
  if (given.stop_sequence_count != 0) {
    need({{"options.stop_sequences", given.stop_sequences},
          {"options.stop_sequence_sizes", given.stop_sequence_sizes}});
    options.stop_sequences = rows_of(given.stop_sequences, given.stop_sequence_sizes,
                                     given.stop_sequence_count, "options.stop_sequences");
  }
  options.temperature = given.temperature;
  options.top_k = given.top_k;
  options.top_p = given.top_p;
  options.repetition_penalty = given.repetition_penalty;
  options.seed = given.seed;
  options.append = given.append != 0;
  if (given.cancellation != nullptr) options.cancellation = &given.cancellation->cancellation;
  if (given.on_logits != nullptr) {
    options.on_logits = [edit = given.on_logits, user](int row, EditableLogits logits,
                                                       const std::vector<Token>& tokens) {
      edit(*user, row, logits.data(), logits.size(), tokens.data(), tokens.size());
    };
  }
  options.logprobs = given.logprobs;
  return options;
}

}  // namespace qwenport::detail

// Generating with a session: the counterpart of engines/generation.py.
//
// A step computes the logits that follow the token it is given, so the last token that a row draws, even a
// stop token, is never fed back: a cache of `capacity` slots allows capacity - p + 1 new tokens after p.
#pragma once

#include <vector>

#include "session.hpp"

namespace qwenport::detail {

std::vector<Generated> generate(SessionCore& session, const std::vector<TokenView>& prompts,
                                const GenerateOptions& options, const OnToken& on_token);

}  // namespace qwenport::detail

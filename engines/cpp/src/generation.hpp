// Generating with a session: the counterpart of engines/generation.py.
//
// A step computes the logits that follow the token it is given, so the last token that a row draws, even a
// stop token, is never fed back: a cache of `capacity` slots allows capacity - p + 1 new tokens after p.
#pragma once

#include <functional>
#include <vector>

#include "session.hpp"

namespace qwenport::detail {

/// Called as OnToken is; true ends the row, with reason `stop`. The result's tokens are all that were drawn.
using TokenSink = std::function<bool(int row, Token token)>;

std::vector<Generated> generate(SessionCore& session, const std::vector<TokenView>& prompts,
                                const GenerateOptions& options, const TokenSink& sink);

}  // namespace qwenport::detail

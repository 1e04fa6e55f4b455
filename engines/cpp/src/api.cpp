// The public Engine and Session: a thin layer over Model and SessionCore. Engine::load is in load.cpp.
#include "backend.hpp"
#include "generation.hpp"
#include "qwenport/qwenport.hpp"
#include "session.hpp"

namespace qwenport {

using detail::TokenView;

const EngineInfo& Engine::info() const noexcept { return model_->manifest().info; }

Session::Session(const Engine& engine, const SessionOptions& options)
    : core_(std::make_unique<detail::SessionCore>(engine.model_, options)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

namespace {

TokenView view(const std::vector<Token>& tokens) { return {tokens.data(), tokens.size()}; }

std::vector<TokenView> views(const std::vector<std::vector<Token>>& rows) {
  std::vector<TokenView> all;
  all.reserve(rows.size());
  for (const std::vector<Token>& row : rows) all.push_back(view(row));
  return all;
}

}  // namespace

Logits Session::prefill(const std::vector<Token>& tokens) {
  const TokenView row = view(tokens);
  return core_->prefill(&row, 1);
}

Logits Session::prefill_batch(const std::vector<std::vector<Token>>& rows) {
  const std::vector<TokenView> all = views(rows);
  return core_->prefill(all.data(), all.size());
}

Logits Session::decode(Token token) { return core_->decode(&token, 1); }

Logits Session::decode_batch(const std::vector<Token>& tokens) {
  return core_->decode(tokens.data(), tokens.size());
}

Generated Session::generate(const std::vector<Token>& prompt, const GenerateOptions& options,
                            const OnToken& on_token) {
  return std::move(detail::generate(*core_, {view(prompt)}, options, on_token).front());
}

std::vector<Generated> Session::generate_batch(const std::vector<std::vector<Token>>& prompts,
                                               const GenerateOptions& options, const OnToken& on_token) {
  return detail::generate(*core_, views(prompts), options, on_token);
}

void Session::reset() { core_->reset(); }
void Session::truncate(int length, int row) { core_->truncate(length, row); }
std::vector<int> Session::lengths() const {
  std::vector<int> all(static_cast<std::size_t>(core_->max_batch()));
  for (std::size_t b = 0; b < all.size(); ++b) all[b] = core_->length(b);
  return all;
}
int Session::max_batch() const noexcept { return core_->max_batch(); }
int Session::capacity() const noexcept { return core_->capacity(); }
bool Session::cuda_graphs() const noexcept { return core_->cuda_graphs(); }
std::vector<std::byte> Session::save() const { return core_->save(); }
void Session::restore(const std::vector<std::byte>& snapshot) { core_->restore(snapshot); }

}  // namespace qwenport

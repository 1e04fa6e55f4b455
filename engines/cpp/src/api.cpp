// The public Error, Engine and Session: a thin layer over Model and SessionCore. Engine::load is in load.cpp.
#include <algorithm>

#include "backend.hpp"
#include "generation.hpp"
#include "qwenport/qwenport.hpp"
#include "self_test.hpp"
#include "session.hpp"

namespace qwenport {

using detail::SessionCore;
using detail::TokenView;

namespace {

/// Bytes of the control character or line separator of UTF-8 at a place, 0 if there is none.
std::size_t control_size(const std::string& text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned first = byte(at);
  const unsigned second = byte(at + 1);
  if (first < 0x20 || first == 0x7F) return 1;
  if (first == 0xC2 && second >= 0x80 && second < 0xA0) return 2;                // U+0080 to U+009F
  if (first == 0xE2 && second == 0x80 && (byte(at + 2) | 1U) == 0xA9) return 3;  // U+2028, U+2029
  return 0;
}

/// Messages quote names, values and what other libraries say: spaces replace whatever may break a line.
std::string one_line(std::string text) {
  for (std::size_t i = 0; i < text.size(); ++i)
    std::fill_n(text.begin() + static_cast<std::ptrdiff_t>(i), control_size(text, i), ' ');
  return text;
}

}  // namespace

Error::Error(ErrorCode code, const std::string& message)
    : std::runtime_error(one_line(message)), code_(code) {}

Engine::Engine(std::shared_ptr<const detail::Model> model, const std::string& directory,
               bool require_self_test)
    : model_(std::move(model)),
      directory_(directory),
      self_test_(std::make_shared<detail::SelfTest>(model_, directory, require_self_test)) {}

SelfTestReport Engine::self_test() const { return self_test_->run(); }

const EngineInfo& Engine::info() const noexcept { return model_->manifest().info; }

Session::Session(const Engine& engine, const SessionOptions& options) {
  engine.self_test_->check_allowed();
  core_ = std::make_shared<SessionCore>(engine.model_, options);
}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

namespace {

/// The session, for a call that uses it.
SessionCore& idle_core(const std::shared_ptr<SessionCore>& core) {
  if (core == nullptr)
    throw Error(ErrorCode::invalid_argument, "this session was moved to another one; use that");
  core->check_idle();
  return *core;
}

TokenView view(const std::vector<Token>& tokens) { return {tokens.data(), tokens.size()}; }

std::vector<TokenView> views(const std::vector<std::vector<Token>>& rows) {
  std::vector<TokenView> all;
  all.reserve(rows.size());
  for (const std::vector<Token>& row : rows) all.push_back(view(row));
  return all;
}

detail::TokenSink forwarding(const OnToken& on_token) {
  return [&on_token](int row, Token token) {
    if (on_token) on_token(row, token);
    return false;
  };
}

}  // namespace

Logits Session::prefill(const std::vector<Token>& tokens, int prompt_length) {
  const TokenView row = view(tokens);
  return idle_core(core_).prefill(&row, 1, prompt_length != 0 ? &prompt_length : nullptr);
}

Logits Session::prefill_batch(const std::vector<std::vector<Token>>& rows,
                              const std::vector<int>& prompt_lengths) {
  const std::vector<TokenView> all = views(rows);
  SessionCore& core = idle_core(core_);
  if (!prompt_lengths.empty() && prompt_lengths.size() != rows.size()) {
    throw Error(ErrorCode::invalid_argument, std::to_string(prompt_lengths.size()) + " prompt lengths for " +
                                                 std::to_string(rows.size()) + " rows");
  }
  return core.prefill(all.data(), all.size(), prompt_lengths.empty() ? nullptr : prompt_lengths.data());
}

Logits Session::decode(Token token) { return idle_core(core_).decode(&token, 1); }

Logits Session::decode_batch(const std::vector<Token>& tokens) {
  return idle_core(core_).decode(tokens.data(), tokens.size());
}

Generated Session::generate(const std::vector<Token>& prompt, const GenerateOptions& options,
                            const OnToken& on_token) {
  const auto core = core_;  // a callback may destroy this session
  return std::move(detail::generate(idle_core(core), {view(prompt)}, options, forwarding(on_token)).front());
}

std::vector<Generated> Session::generate_batch(const std::vector<std::vector<Token>>& prompts,
                                               const GenerateOptions& options, const OnToken& on_token) {
  const auto core = core_;  // a callback may destroy this session
  return detail::generate(idle_core(core), views(prompts), options, forwarding(on_token));
}

void Session::reset() { idle_core(core_).reset(); }
void Session::truncate(int length, int row) { idle_core(core_).truncate(length, row); }
std::vector<int> Session::lengths() const {
  std::vector<int> all(static_cast<std::size_t>(core_->max_batch()));
  for (std::size_t b = 0; b < all.size(); ++b) all[b] = core_->length(b);
  return all;
}
int Session::max_batch() const noexcept { return core_->max_batch(); }
int Session::capacity() const noexcept { return core_->capacity(); }
bool Session::cuda_graphs() const noexcept { return core_->cuda_graphs(); }
std::vector<std::byte> Session::save() const { return idle_core(core_).save(); }
void Session::restore(const std::vector<std::byte>& snapshot) { idle_core(core_).restore(snapshot); }

}  // namespace qwenport

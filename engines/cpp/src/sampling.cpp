#include "sampling.hpp"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

static_assert(FLT_EVAL_METHOD == 0, "the sampler's bits need float and double to be rounded as such");
static_assert(std::numeric_limits<double>::is_iec559, "the sampler's bits need IEEE-754");

namespace qwenport::detail {
namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

/// \param allowed the values for which `ok` holds, in words.
double checked(const char* name, double value, bool ok, const char* allowed) {
  if (ok) return value;
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.9g", value);
  throw Error(ErrorCode::invalid_argument,
              std::string(name) + " must be " + allowed + ", got " + text.data());
}

class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t state) noexcept : state_(state) {}
  std::uint64_t next() noexcept {
    state_ += 0x9E3779B97F4A7C15;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EB;
    return z ^ (z >> 31U);
  }

 private:
  std::uint64_t state_;
};

constexpr std::uint64_t rotl(std::uint64_t x, unsigned k) { return (x << k) | (x >> (64U - k)); }

constexpr std::array<double, 14> exp_terms() {  // 1/13!, ..., 1/1!, 1/0!
  std::array<double, 14> terms{};
  double factorial = 1;
  for (std::size_t n = 0; n < terms.size(); ++n) {
    if (n > 1) factorial *= static_cast<double>(n);
    terms[terms.size() - 1 - n] = 1.0 / factorial;
  }
  return terms;
}

/// The terms' polynomial, without a loop.
template <std::size_t... N>
double horner(double r, std::index_sequence<N...> /*the terms after the first*/) noexcept {
  constexpr std::array<double, 14> terms = exp_terms();
  double p = terms[0];
  ((p = p * r + terms[N + 1]), ...);
  return p;
}

/// Below -708, exp is defined to be 0; for this value portable_exp computes 0.
constexpr double exp_argument(double x) noexcept { return x < -708.0 ? -709.0 : x; }

/// exp(x) with the same bits everywhere, for exp_argument's result with x <= 0: see portable_exp in
/// engines/sampling.py. Free of branches, so that a loop over it is vectorised.
inline double portable_exp(double x) noexcept {
  constexpr double log2e = 0x1.71547652b82fep+0;
  constexpr double ln2_hi = 0x1.62e42feep-1;
  constexpr double ln2_lo = 0x1.a39ef35793c76p-33;
  constexpr double to_integer = 0x1.8p52;  // adding and subtracting it rounds half to even
  const double shifted = x * log2e + to_integer;
  const double k = shifted - to_integer;
  const double r = (x - k * ln2_hi) - k * ln2_lo;
  const double p = horner(r, std::make_index_sequence<13>());
  std::uint64_t bits = 0;  // the low bits of `shifted` are k; its exponent leaves at the top
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023U) << 52U;
  double power = 0;  // 2^k, or 0 for k = -1023
  std::memcpy(&power, &bits, sizeof power);
  return p * power;  // exact: the result is a normal number, or 0
}

constexpr std::array<double, 12> log_terms() {  // 1/23, ..., 1/3, 1
  std::array<double, 12> terms{};
  for (std::size_t n = 0; n < terms.size(); ++n) {
    terms[terms.size() - 1 - n] = 1.0 / static_cast<double>(2 * n + 1);
  }
  return terms;
}

/// log(x) with the same bits everywhere, for a finite x >= 1: see portable_log in engines/sampling.py.
double portable_log(double x) noexcept {
  constexpr double ln2 = 0x1.62e42fefa39efp-1;
  constexpr double sqrt_half = 0x1.6a09e667f3bcdp-1;
  constexpr std::array<double, 12> terms = log_terms();
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < sqrt_half) {
    m *= 2;
    --exponent;
  }
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  double p = terms[0];
  for (std::size_t n = 1; n < terms.size(); ++n) p = p * z + terms[n];
  return static_cast<double>(exponent) * ln2 + 2 * s * p;
}

/// The highest score. \throws Error sampling: it is not finite, or there is a NaN.
float checked_max(const float* scores, std::size_t count, const char* what) {
  // As integers that sort like the floats: that loop is vectorised, one over floats is not.
  constexpr std::uint32_t sign = 0x80000000;
  const auto negative = [](std::uint32_t bits) { return bits >= sign ? ~sign : 0U; };
  std::int32_t top = std::numeric_limits<std::int32_t>::min();
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, scores + i, sizeof bits);
    const auto magnitude = static_cast<std::int32_t>(bits & ~sign);
    const auto ordered = static_cast<std::int32_t>(bits ^ negative(bits));
    top = ordered > top ? ordered : top;
    largest = magnitude > largest ? magnitude : largest;
  }
  const std::uint32_t bits = static_cast<std::uint32_t>(top) ^ negative(static_cast<std::uint32_t>(top));
  float highest = 0;
  std::memcpy(&highest, &bits, sizeof highest);
  const bool nan = largest > 0x7f800000;
  if (nan || !std::isfinite(highest)) {
    const char* const infinity = highest > 0 ? "inf" : "-inf";
    throw Error(ErrorCode::sampling, std::string("no token can be chosen: the highest of the ") + what +
                                         " is " + (nan ? "nan" : infinity));
  }
  return highest;
}

/// The lowest id whose score is `top`, which must occur.
Token first_of(const float* scores, std::size_t count, float top) {
  constexpr std::size_t block = 256;
  std::size_t i = 0;
  for (; i + block <= count; i += block) {
    unsigned found = 0;
    for (std::size_t j = i; j < i + block; ++j) found |= static_cast<unsigned>(scores[j] == top);
    if (found != 0) break;
  }
  return std::find(scores + i, scores + count, top) - scores;
}

}  // namespace

SamplingParams checked_params(const GenerateOptions& options) {
  const double temperature = options.temperature;
  const double top_p = options.top_p;
  const double penalty = options.repetition_penalty;
  if (options.top_k < 0) {
    throw Error(ErrorCode::invalid_argument,
                "top_k must be at least 0, got " + std::to_string(options.top_k));
  }
  SamplingParams params;
  params.temperature =
      checked("temperature", temperature, temperature == 0 || (temperature >= 1e-30 && temperature <= 1e30),
              "0 or in [1e-30, 1e30]");
  params.top_k = options.top_k;
  params.top_p = checked("top_p", top_p, top_p >= 0 && top_p <= 1, "in [0, 1]");
  params.repetition_penalty =
      checked("repetition_penalty", penalty, penalty >= 1e-30 && penalty <= 1e30, "in [1e-30, 1e30]");
  return params;
}

void check_logits(const float* logits, std::size_t vocab_size, bool edited) {
  const auto banned = [](float logit) { return logit == minus_infinity; };
  if (edited && std::all_of(logits, logits + vocab_size, banned)) {
    throw Error(ErrorCode::sampling, "no token can be chosen: on_logits banned every token");
  }
  checked_max(logits, vocab_size, edited ? "logits after on_logits" : "logits");
}

LogProbabilities::LogProbabilities(const float* logits, std::size_t vocab_size)
    : logits_(logits), vocab_(vocab_size), highest_(checked_max(logits, vocab_size, "logits")) {
  std::array<double, 256> weights{};  // of one block, so that the loop over portable_exp is vectorised
  double total = 0;
  for (std::size_t begin = 0; begin < vocab_; begin += weights.size()) {
    const std::size_t count = std::min(weights.size(), vocab_ - begin);
    for (std::size_t i = 0; i < count; ++i) {
      weights[i] = portable_exp(exp_argument(static_cast<double>(logits[begin + i]) - highest_));
    }
    for (std::size_t i = 0; i < count; ++i) total += weights[i];
  }
  log_total_ = portable_log(total);
}

float LogProbabilities::of(Token token) const noexcept {
  return static_cast<float>((static_cast<double>(logits_[token]) - highest_) - log_total_);
}

std::vector<TokenLogprob> LogProbabilities::top(std::size_t count) const {
  std::vector<Token> ids(vocab_);
  std::iota(ids.begin(), ids.end(), Token{0});
  const auto end = ids.begin() + static_cast<std::ptrdiff_t>(count);
  std::partial_sort(ids.begin(), end, ids.end(), [this](Token a, Token b) {
    return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b);
  });
  std::vector<TokenLogprob> likely;
  likely.reserve(count);
  for (auto id = ids.begin(); id != end; ++id) likely.push_back({*id, of(*id)});
  return likely;
}

Random::Random(std::uint64_t seed, std::uint64_t row) noexcept {
  SplitMix64 mix(SplitMix64(seed).next() + row);
  for (std::uint64_t& word : state_) word = mix.next();
}

double Random::uniform() noexcept {
  auto& s = state_;
  const std::uint64_t result = rotl(s[1] * 5, 7) * 9;
  const std::uint64_t t = s[1] << 17U;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= t;
  s[3] = rotl(s[3], 45);
  return static_cast<double>(result >> 11U) * 0x1p-53;
}

Sampler::Sampler(const SamplingParams& params, std::uint64_t seed, std::uint64_t row, int vocab_size)
    : params_(params), random_(seed, row), vocab_(static_cast<std::size_t>(vocab_size)) {
  if (params.greedy() && params.repetition_penalty == 1) return;
  scores_.resize(vocab_);
  if (params.greedy()) return;
  kept_.resize(vocab_);
  weights_.resize(vocab_);
  order_.reserve(vocab_);
  highest_.reserve(vocab_);
}

Token Sampler::sample(const float* logits, const std::vector<Token>& seen) {
  float top = checked_max(logits, vocab_, "logits");
  if (scores_.empty()) return first_of(logits, vocab_, top);
  std::copy_n(logits, vocab_, scores_.begin());
  penalise(logits, seen);
  if (!params_.greedy() && params_.temperature != 1) {
    const auto temperature = static_cast<float>(params_.temperature);
    for (float& score : scores_) score /= temperature;
  }
  top = checked_max(scores_.data(), vocab_, "processed scores");
  if (params_.greedy()) return first_of(scores_.data(), vocab_, top);
  keep_top_k();
  keep_top_p(top);
  const std::size_t count = weigh(top);
  total_ = 0;
  for (std::size_t i = 0; i < count; ++i) weights_[i] = total_ += weights_[i];  // now cumulative
  const double target = random_.uniform() * total_;
  const auto end = weights_.begin() + static_cast<std::ptrdiff_t>(count);
  return kept_[static_cast<std::size_t>(std::upper_bound(weights_.begin(), end, target) - weights_.begin())];
}

void Sampler::penalise(const float* logits, const std::vector<Token>& seen) {
  if (params_.repetition_penalty == 1) return;
  const auto penalty = static_cast<float>(params_.repetition_penalty);
  for (const Token token : seen) {
    const auto id = static_cast<std::size_t>(token);
    if (id >= scores_.size()) continue;
    scores_[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
  }
}

void Sampler::keep_top_k() {
  const auto k = static_cast<std::uint64_t>(params_.top_k);
  if (k == 0 || k >= vocab_) return;
  // The k-th highest: keep at most 2k candidates at a time and drop their lower half.
  const auto kth = static_cast<std::ptrdiff_t>(k - 1);
  float threshold = minus_infinity;
  highest_.clear();
  for (const float score : scores_) {
    if (score <= threshold) continue;
    highest_.push_back(score);
    if (highest_.size() < 2 * k) continue;
    std::nth_element(highest_.begin(), highest_.begin() + kth, highest_.end(), std::greater<>());
    highest_.resize(k);
    threshold = highest_[k - 1];
  }
  if (highest_.size() < k) return;  // the others are -inf
  std::nth_element(highest_.begin(), highest_.begin() + kth, highest_.end(), std::greater<>());
  threshold = highest_[k - 1];
  for (float& score : scores_) score = score < threshold ? minus_infinity : score;
}

/// Fill kept_ and weights_ from scores_, whose highest is `top`. Returns their number.
std::size_t Sampler::weigh(float top) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < vocab_; ++i) {
    kept_[count] = static_cast<std::uint32_t>(i);
    weights_[count] = exp_argument(static_cast<double>(scores_[i] - top));
    count += static_cast<std::size_t>(scores_[i] > minus_infinity);
  }
  for (std::size_t i = 0; i < count; ++i) weights_[i] = portable_exp(weights_[i]);
  return count;
}

/// Drop the least likely tokens whose cumulative probability is at most 1 - top_p: first, unsorted, the tail,
/// which cannot reach half of it in total; then the rest, by ascending score.
void Sampler::keep_top_p(float top) {
  if (params_.top_p == 1) return;
  const std::size_t count = weigh(top);
  double total = 0;
  for (std::size_t i = 0; i < count; ++i) total += weights_[i];
  const auto threshold = static_cast<float>(1.0 - params_.top_p);
  const double in_tail = 0.5 * static_cast<double>(threshold) / static_cast<double>(count);
  for (std::size_t i = 0; i < count; ++i) weights_[i] = static_cast<float>(weights_[i] / total);
  double sum = 0;
  order_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    if (weights_[i] < in_tail) {
      sum += weights_[i];
      scores_[kept_[i]] = minus_infinity;
    } else {
      order_.push_back(static_cast<std::uint32_t>(i));
    }
  }
  // By score, then by id; kept_ ascends, so the second key is the index itself.
  std::sort(order_.begin(), order_.end(), [this](std::uint32_t a, std::uint32_t b) {
    const float left = scores_[kept_[a]];
    const float right = scores_[kept_[b]];
    return left < right || (left == right && a < b);
  });
  for (std::size_t i = 0; i + 1 < order_.size(); ++i) {
    sum += weights_[order_[i]];
    if (static_cast<float>(sum) > threshold) break;  // sums ascend
    scores_[kept_[order_[i]]] = minus_infinity;
  }
}

}  // namespace qwenport::detail

#include "proof.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "contract.hpp"

namespace qwenport::detail {
namespace {

using nlohmann::json;

constexpr std::size_t most_top = 32;
constexpr std::size_t most_bytes = std::size_t{32} << 20U;
constexpr std::array metadata_keys{"format",     "format_version", "package_sha256", "dtype",
                                   "vocab_size", "cases",          "experts",        "made_by"};
constexpr std::size_t kinds_of_bounds = 3;  // of the bounds
constexpr std::size_t directions = 64;      // of the projection: a token's signs are the bits of one word

/// A tensor of 32-bit elements.
struct Table {
  std::size_t rows = 0;
  std::size_t columns = 0;
  const char* data = nullptr;
};

/// The header and the tensors of a safetensors file.
class Tensors {
 public:
  Tensors(std::string_view file, const std::string& where) : where_(where) {
    std::uint64_t length = 0;  // little endian, as this machine is
    if (file.size() > most_bytes) fail("larger than any proof");
    if (file.size() < sizeof length) fail("too short to be a safetensors file");
    std::memcpy(&length, file.data(), sizeof length);
    if (length > file.size() - sizeof length) fail("its header is longer than the file");
    const std::string_view text = file.substr(sizeof length, static_cast<std::size_t>(length));
    values_ = file.substr(sizeof length + text.size());
    header_ = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
    if (!header_.is_object()) fail("its header is not a JSON object");
    for (const char* key : metadata_keys) (void)metadata(key);
    if (header_["__metadata__"].size() != metadata_keys.size())
      fail("__metadata__ has keys of another format");
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw Error(ErrorCode::bad_engine, where_ + ": damaged: " + message);
  }
  [[noreturn]] void wrong(const std::string& name, const std::string& expected) const {
    fail(name + " is not " + expected);
  }

  [[nodiscard]] std::string metadata(const std::string& key) const {
    const auto all = header_.find("__metadata__");
    if (all == header_.end() || !all->is_object()) fail("no __metadata__");
    const auto found = all->find(key);
    if (found == all->end() || !found->is_string()) fail("no " + key + " in __metadata__");
    return found->get<std::string>();
  }
  void check_metadata(const std::string& key, const std::string& expected) const {
    if (metadata(key) != expected) wrong(key, expected);
  }

  /// \param columns 0: the tensor has one dimension.
  Table take(const std::string& name, const char* dtype, std::size_t columns) {
    const auto found = header_.find(name);
    if (found == header_.end() || !found->is_object()) fail("no " + name);
    const auto given = found->find("dtype");
    if (given == found->end() || *given != dtype) wrong(name, std::string("of dtype ") + dtype);
    const std::vector<std::uint64_t> shape = numbers(*found, name, "shape");
    if (shape.size() != (columns == 0 ? 1U : 2U) || (columns != 0 && shape[1] != columns)) {
      wrong(name, columns == 0 ? "of one dimension" : "of " + std::to_string(columns) + " columns");
    }
    const std::vector<std::uint64_t> offsets = numbers(*found, name, "data_offsets");
    const std::size_t row_bytes = std::max<std::size_t>(columns, 1) * sizeof(float);
    const bool fits = offsets.size() == 2 && offsets[0] <= offsets[1] && offsets[1] <= values_.size() &&
                      shape[0] <= values_.size() && offsets[1] - offsets[0] == shape[0] * row_bytes;
    if (!fits) wrong(name, "at a place in the file that has its size");
    taken_.emplace_back(offsets[0], offsets[1]);
    return {static_cast<std::size_t>(shape[0]), std::max<std::size_t>(columns, 1),
            values_.data() + offsets[0]};
  }

  /// After the last tensor is taken: they are all, and cover the file.
  void check_all_taken() {
    if (header_.size() != taken_.size() + 1) fail("it has tensors that do not belong there");
    std::sort(taken_.begin(), taken_.end());
    std::uint64_t end = 0;
    for (const auto& [first, last] : taken_) {
      if (first != end) fail("its tensors overlap or leave a gap");
      end = last;
    }
    if (end != values_.size()) fail("it goes on after its tensors");
  }

 private:
  [[nodiscard]] std::vector<std::uint64_t> numbers(const json& tensor, const std::string& name,
                                                   const char* key) const {
    const auto found = tensor.find(key);
    const bool ok = found != tensor.end() && found->is_array() && found->size() <= 2 &&
                    std::all_of(found->begin(), found->end(),
                                [](const json& value) { return value.is_number_unsigned(); });
    if (!ok) fail(name + " has no " + key);
    return found->get<std::vector<std::uint64_t>>();
  }

  const std::string& where_;
  std::string_view values_;
  json header_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken_;
};

template <typename T>
std::vector<T> copied(const Table& table) {
  static_assert(sizeof(T) == sizeof(float));
  std::vector<T> values(table.rows * table.columns);
  if (!values.empty()) std::memcpy(values.data(), table.data, values.size() * sizeof(T));
  return values;
}

std::vector<std::int32_t> tokens_of(const Tensors& file, const char* name, const Table& table, int vocab) {
  auto tokens = copied<std::int32_t>(table);
  const bool inside =
      std::all_of(tokens.begin(), tokens.end(), [vocab](std::int32_t id) { return id >= 0 && id < vocab; });
  if (!inside) file.wrong(name, "inside the vocabulary of " + std::to_string(vocab));
  return tokens;
}

std::vector<float> numbers_of(const Tensors& file, const char* name, const Table& table,
                              float least = std::numeric_limits<float>::lowest()) {
  auto values = copied<float>(table);
  const bool fits = std::all_of(values.begin(), values.end(),
                                [least](float value) { return std::isfinite(value) && value >= least; });
  if (!fits) file.wrong(name, least < 0 ? "finite" : "finite and large enough");
  return values;
}

struct Sequence {
  const std::int32_t* tokens = nullptr;
  int length = 0;
};

using Marks = std::map<std::pair<int, int>, const Mark*>;  // by sequence and length

/// Makes cases of the operations, and checks that a session can run them.
class Operations {
 public:
  Operations(const Tensors& file, const std::vector<Sequence>& sequences, const Marks& marks)
      : file_(file), sequences_(sequences), marks_(marks) {}

  /// \param operation case, call, kind, row, sequence, end.
  void add(const std::int32_t* operation, std::vector<ProofCase>& cases) {
    const int row = operation[3];
    const int sequence = operation[4];
    const int end = operation[5];
    const bool begins = operation[2] == begin;
    const int number = static_cast<int>(cases.size()) - (begins ? 0 : 1);
    expect(number >= 0 && operation[0] == number, "a case that is not the next");
    const bool same_call = operation[2] == feed && is_feed_ && operation[1] == call_;
    expect(same_call || operation[1] == call_ + 1, "a call that is not the next");
    call_ = operation[1];
    is_feed_ = operation[2] == feed;
    if (begins) {
      expect(row >= 1 && sequence == none && end >= 1, "a case without rows or slots");
      cases.push_back({"", row, end, {}});
      held_.clear();
      return;
    }
    ProofCase& current = cases.back();
    if (!same_call) current.steps.push_back({kind_of(operation[2]), call_, {}, 0, 0});
    ProofStep& step = current.steps.back();
    const bool of_row = operation[2] == feed || operation[2] == truncate;
    expect(of_row ? row >= 0 && row < current.rows : row == none && end == none, "a row of another case");
    expect(is_feed_ || sequence == none, "a sequence where none is read");
    if (operation[2] == reset) held_.clear();
    if (!of_row) return;
    Sequence& held = held_[row];
    if (is_feed_) {
      add_feed(step, row, sequence, end, held, current.slots);
    } else {
      expect(end >= 0 && end <= held.length, "a row that is truncated to more than it holds");
      held.length = step.length = end;
      step.row = row;
    }
  }

 private:
  enum { none = -1, begin = 0, feed = 1, truncate = 2, poison = 3, reset = 4 };

  void add_feed(ProofStep& step, int row, int sequence, int end, Sequence& held, int slots) {
    expect(step.feeds.empty() || step.feeds.back().row < row, "rows of a call that do not rise");
    expect(sequence >= 0 && static_cast<std::size_t>(sequence) < sequences_.size(), "no such sequence");
    const Sequence& text = sequences_[static_cast<std::size_t>(sequence)];
    expect(end > held.length && end <= text.length && end <= slots, "an end outside the row");
    expect(held.tokens == text.tokens || std::equal(held.tokens, held.tokens + held.length, text.tokens),
           "a sequence that does not begin with what its row holds");
    const auto mark = marks_.find({sequence, end});
    step.feeds.push_back({row, end, text.tokens + held.length, static_cast<std::size_t>(end - held.length),
                          mark == marks_.end() ? nullptr : mark->second});
    held = {text.tokens, end};
  }

  void expect(bool holds, const char* what) const {
    if (!holds) file_.fail(std::string("operations: ") + what);
  }

  [[nodiscard]] ProofStep::Kind kind_of(int kind) const {
    expect(kind >= feed && kind <= reset, "no such kind");
    constexpr std::array kinds{ProofStep::Kind::feed, ProofStep::Kind::truncate, ProofStep::Kind::poison,
                               ProofStep::Kind::reset};
    return kinds[static_cast<std::size_t>(kind - feed)];
  }

  const Tensors& file_;
  const std::vector<Sequence>& sequences_;
  const Marks& marks_;
  std::map<int, Sequence> held_;
  int call_ = -1;
  bool is_feed_ = false;
};

std::vector<std::string> case_names(const Tensors& file) {
  const json names = json::parse(file.metadata("cases"), nullptr, /*allow_exceptions=*/false);
  const auto is_line = [](const json& name) {
    if (!name.is_string()) return false;
    const auto& text = name.get_ref<const std::string&>();
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
  };
  if (!names.is_array() || names.empty() || !std::all_of(names.begin(), names.end(), is_line)) {
    file.wrong("cases", "a list of names");
  }
  return names.get<std::vector<std::string>>();
}

/// splitmix64: bit j is the sign of the token's logit in direction j.
std::uint64_t signs(std::uint64_t token) {
  std::uint64_t z = token + 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27U)) * 0x94D049BB133111EB;
  return z ^ (z >> 31U);
}

}  // namespace

Proof::Proof(std::string_view file, const std::string& where, int vocab_size)
    : vocab_size_(static_cast<std::size_t>(vocab_size)), top_(std::min(most_top, vocab_size_)) {
  Tensors tensors(file, where);
  tensors.check_metadata("format", contract::proof_format);
  const std::string version = tensors.metadata("format_version");
  if (version != std::to_string(contract::proof_version)) {
    throw Error(ErrorCode::bad_engine, where + ": " + contract::proof_format + " format version " + version +
                                           ", this runtime reads " + std::to_string(contract::proof_version) +
                                           "; build the engine again");
  }
  tensors.check_metadata("vocab_size", std::to_string(vocab_size));
  package_sha256_ = tensors.metadata("package_sha256");
  dtype_ = tensors.metadata("dtype");
  const bool known = std::any_of(std::begin(contract::dtypes), std::end(contract::dtypes),
                                 [this](const contract::Dtype& dtype) { return dtype.name == dtype_; });
  if (!known) tensors.wrong("dtype", "one that a package has");

  tokens_ = tokens_of(tensors, "tokens", tensors.take("tokens", "I32", 0), vocab_size);
  const Table parts = tensors.take("sequences", "I32", 2);
  const auto places = copied<std::int32_t>(parts);
  std::vector<Sequence> sequences;
  for (std::size_t i = 0; i < parts.rows; ++i) {
    const std::int64_t start = places[2 * i];
    const std::int64_t length = places[2 * i + 1];
    if (start < 0 || length < 1 || start + length > static_cast<std::int64_t>(tokens_.size())) {
      tensors.wrong("sequences", "inside tokens");
    }
    sequences.push_back({tokens_.data() + start, static_cast<int>(length)});
  }

  const Table marked = tensors.take("marks", "I32", 2);
  const Table ids = tensors.take("top_ids", "I32", top_);
  const Table values = tensors.take("top_values", "F32", top_);
  const Table lengths = tensors.take("norms", "F32", 0);
  const Table projected = tensors.take("projections", "F32", directions);
  const Table allowed = tensors.take("bounds", "F32", kinds_of_bounds);
  for (const Table* table : {&ids, &values, &lengths, &projected, &allowed}) {
    if (table->rows != marked.rows) tensors.fail("its marks differ in number");
  }
  top_ids_ = tokens_of(tensors, "top_ids", ids, vocab_size);
  top_values_ = numbers_of(tensors, "top_values", values);
  projections_ = numbers_of(tensors, "projections", projected);
  const auto norms = numbers_of(tensors, "norms", lengths, 0);
  const auto bounds = numbers_of(tensors, "bounds", allowed, std::numeric_limits<float>::denorm_min());
  const auto ends = copied<std::int32_t>(marked);
  Marks marks;
  marks_.reserve(marked.rows);
  for (std::size_t i = 0; i < marked.rows; ++i) {
    const int sequence = ends[2 * i];
    const int length = ends[2 * i + 1];
    if (sequence < 0 || static_cast<std::size_t>(sequence) >= sequences.size() || length < 1 ||
        length > sequences[static_cast<std::size_t>(sequence)].length) {
      tensors.wrong("marks", "inside sequences");
    }
    const float norm = norms[i] == 0 ? 1 : norms[i];
    marks_.push_back(
        {&top_ids_[i * top_],
         &top_values_[i * top_],
         &projections_[i * directions],
         norm,
         {bounds[kinds_of_bounds * i], bounds[kinds_of_bounds * i + 1], bounds[kinds_of_bounds * i + 2]}});
    if (!marks.emplace(std::pair(sequence, length), &marks_.back()).second) {
      tensors.wrong("marks", "without a pair that occurs twice");
    }
  }

  const Table listed = tensors.take("operations", "I32", 6);
  tensors.check_all_taken();
  const auto numbers = copied<std::int32_t>(listed);
  Operations operations(tensors, sequences, marks);
  for (std::size_t i = 0; i < listed.rows; ++i) operations.add(&numbers[6 * i], cases_);
  const std::vector<std::string> names = case_names(tensors);
  if (names.size() != cases_.size()) tensors.wrong("cases", "a name for each case");
  for (std::size_t i = 0; i < names.size(); ++i) cases_[i].name = names[i];
}

double Proof::error(const Mark& mark, const float* logits) const {
  if (!std::all_of(logits, logits + vocab_size_, [](float value) { return std::isfinite(value); })) {
    return std::numeric_limits<double>::infinity();
  }
  double apart = 0;
  double length = 0;
  for (std::size_t i = 0; i < top_; ++i) {
    const double expected = mark.top_values[i];
    const double difference = static_cast<double>(logits[mark.top_ids[i]]) - expected;
    apart += difference * difference;
    length += expected * expected;
  }
  // Logits near zero are compared with those of an average row of this norm.
  const double average = mark.norm * std::sqrt(static_cast<double>(top_) / static_cast<double>(vocab_size_));
  const double by_top = std::sqrt(apart) / std::max(std::sqrt(length), average);

  std::array<double, directions> sums{};
  for (std::size_t token = 0; token < vocab_size_; ++token) {
    const std::uint64_t bits = signs(token);
    const double value = logits[token];
    const std::array<double, 2> by_bit{-value, value};
    for (std::size_t j = 0; j < directions; ++j) sums[j] += by_bit[(bits >> j) & 1U];
  }
  double square = 0;
  for (std::size_t j = 0; j < directions; ++j) {
    const double difference = sums[j] - static_cast<double>(mark.projections[j]);
    square += difference * difference;
  }
  return std::max(by_top, std::sqrt(square / static_cast<double>(directions)) / mark.norm);
}

}  // namespace qwenport::detail

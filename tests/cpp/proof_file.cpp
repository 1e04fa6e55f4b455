#include "proof_file.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <sstream>

namespace stand_in {
namespace {

/// The output of splitmix64 for a state.
std::uint64_t splitmix64(std::uint64_t state) {
  std::uint64_t z = state + 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27U)) * 0x94D049BB133111EB;
  return z ^ (z >> 31U);
}

/// The body of the file and, on the way, its header.
class Writer {
 public:
  template <typename T>
  void add(const char* name, std::size_t columns, const std::vector<T>& values) {
    static_assert(sizeof(T) == 4);
    const std::size_t begin = body_.size();
    body_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
    header_ << ",\"" << name << R"(":{"dtype":")" << (std::is_same_v<T, float> ? "F32" : "I32")
            << R"(","shape":[)" << values.size() / std::max<std::size_t>(columns, 1);
    if (columns != 0) header_ << "," << columns;
    header_ << R"(],"data_offsets":[)" << begin << "," << body_.size() << "]}";
  }
  [[nodiscard]] std::string file(const std::string& metadata) const {
    const std::string header = "{\"__metadata__\":" + metadata + header_.str() + "}";
    const std::uint64_t length = header.size();
    std::string bytes(sizeof length, 0);
    std::memcpy(bytes.data(), &length, sizeof length);
    return bytes + header + body_;
  }

 private:
  std::ostringstream header_;
  std::string body_;
};

}  // namespace

void ProofFile::add(int kind, int row, int sequence, int end) {
  const std::int32_t operation[] = {static_cast<int>(cases_.size()) - 1, call_, kind, row, sequence, end};
  operations_.insert(operations_.end(), std::begin(operation), std::end(operation));
}

void ProofFile::begin(const std::string& name, int rows, int slots) {
  cases_.push_back(name);
  ++call_;
  add(0, rows, -1, slots);
}

void ProofFile::feed(const std::vector<Fed>& rows) {
  ++call_;
  for (const Fed& fed : rows) {
    add(1, fed.row, fed.sequence, fed.end);
    const std::pair mark{fed.sequence, fed.end};
    if (std::find(marks_.begin(), marks_.end(), mark) == marks_.end()) marks_.push_back(mark);
  }
}

void ProofFile::truncate(int row, int length) {
  ++call_;
  add(2, row, -1, length);
}

void ProofFile::poison() {
  ++call_;
  add(3, -1, -1, -1);
}

void ProofFile::reset() {
  ++call_;
  add(4, -1, -1, -1);
}

std::string ProofFile::bytes(
    const std::function<std::vector<float>(const std::vector<std::int64_t>&)>& logits) const {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> places;
  for (const auto& sequence : sequences) {
    places.push_back(static_cast<std::int32_t>(tokens.size()));
    places.push_back(static_cast<std::int32_t>(sequence.size()));
    tokens.insert(tokens.end(), sequence.begin(), sequence.end());
  }
  std::vector<std::int32_t> marks;
  std::vector<std::int32_t> top_ids;
  std::vector<float> top_values;
  std::vector<float> norms;
  std::vector<float> projections;
  std::vector<float> allowed;
  std::size_t vocab = 0;
  std::size_t top = 0;
  for (const auto& [sequence, length] : marks_) {
    const auto& text = sequences[static_cast<std::size_t>(sequence)];
    const std::vector<float> row = logits({text.begin(), text.begin() + length});
    vocab = row.size();
    top = std::min<std::size_t>(32, vocab);
    marks.insert(marks.end(), {sequence, length});
    std::vector<std::int32_t> ids(vocab);
    std::iota(ids.begin(), ids.end(), 0);
    std::sort(ids.begin(), ids.end(), [&row](std::int32_t a, std::int32_t b) {
      const float first = row[static_cast<std::size_t>(a)];
      const float second = row[static_cast<std::size_t>(b)];
      return first > second || (first == second && a < b);
    });
    for (std::size_t i = 0; i < top; ++i) {
      top_ids.push_back(ids[i]);
      top_values.push_back(row[static_cast<std::size_t>(ids[i])]);
    }
    double square = 0;
    for (const float value : row) square += static_cast<double>(value) * value;
    norms.push_back(static_cast<float>(std::sqrt(square)));
    for (unsigned j = 0; j < 64; ++j) {
      double sum = 0;
      for (std::size_t v = 0; v < vocab; ++v) sum += ((splitmix64(v) >> j) & 1U) != 0 ? row[v] : -row[v];
      projections.push_back(static_cast<float>(sum));
    }
    allowed.insert(allowed.end(), bounds.begin(), bounds.end());
  }
  std::string names;
  for (const std::string& name : cases_) names += (names.empty() ? "" : ",") + ("\\\"" + name + "\\\"");
  Writer writer;
  writer.add("tokens", 0, tokens);
  writer.add("sequences", 2, places);
  writer.add("marks", 2, marks);
  writer.add("top_ids", top, top_ids);
  writer.add("top_values", top, top_values);
  writer.add("norms", 0, norms);
  writer.add("projections", 64, projections);
  writer.add("bounds", 3, allowed);
  writer.add("operations", 6, operations_);
  return writer.file(R"({"format":"qwenport-proof","format_version":"2","package_sha256":")" +
                     package_sha256 + R"(","dtype":")" + dtype + R"(","vocab_size":")" +
                     std::to_string(vocab) + R"(","cases":"[)" + names +
                     R"(]","experts":"[0, 0]","made_by":"{}"})");
}

}  // namespace stand_in

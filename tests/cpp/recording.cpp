// Playing back a recorded run. Each step must be given exactly what the recorded session was given, over
// caches that hold exactly what the steps before left there; then it gets the keys, values and logits that
// the real model computed. The file, little endian (tests/cpp/recording.py writes it):
//   steps:i64, and for each
//     rows:i64 width:i64 span:i64   input_ids, position_ids [rows, width]   write_indices [rows]
//     key_positions [span]   logits_indices [rows]   : i64
//     for each cache binding: the new part, fp32 [rows, kv_heads, width, head_dim]
//     logits fp32 [rows, vocab]
#include <cstring>
#include <fstream>

#include "stand_in.hpp"

namespace stand_in {

using qwenport::detail::Manifest;

namespace {

class Recording {
 public:
  Recording(const Manifest& manifest, const std::string& path)
      : manifest_(manifest), file_(path, std::ios::binary) {
    steps_ = read<std::int64_t>(1).at(0);
    const std::size_t cache = static_cast<std::size_t>(manifest.info.max_batch) * row_floats();
    mirror_.assign(manifest.caches.size(), std::vector<float>(cache));
  }

  void step(const Call& call) {
    const std::string here = "step " + std::to_string(step_) + ": ";
    if (step_++ == steps_) throw Misuse(here + "the recording has ended");
    const auto sizes = read<std::int64_t>(3);
    if (sizes != std::vector<std::int64_t>{call.rows(), call.width(), call.span()}) {
      throw Misuse(here + "rows, width or span are not the recorded ones");
    }
    const auto rows = static_cast<std::size_t>(sizes[0]);
    const auto width = static_cast<std::size_t>(sizes[1]);
    const auto span = static_cast<std::size_t>(sizes[2]);
    for (const auto& [name, count] :
         {std::pair{"input_ids", rows * width}, std::pair{"position_ids", rows * width},
          std::pair{"write_indices", rows}, std::pair{"key_positions", span},
          std::pair{"logits_indices", rows}}) {
      if (std::memcmp(call.memory.at(name), read<std::int64_t>(count).data(), count * sizeof(std::int64_t)) !=
          0) {
        throw Misuse(here + name + " is not the recorded one");
      }
    }
    check_call(manifest_, call);
    for (std::size_t c = 0; c < mirror_.size(); ++c) {
      auto* cache = static_cast<float*>(call.memory.at(manifest_.caches[c].present));
      if (std::memcmp(cache, mirror_[c].data(), rows * row_floats() * sizeof(float)) != 0) {
        throw Misuse(here + manifest_.caches[c].past + " does not hold what the steps before left there");
      }
      write(mirror_[c], call, read<float>(rows * heads() * width * dim()));
      std::memcpy(cache, mirror_[c].data(), rows * row_floats() * sizeof(float));
    }
    const auto logits = read<float>(rows * static_cast<std::size_t>(manifest_.info.vocab_size));
    std::memcpy(call.memory.at("logits"), logits.data(), logits.size() * sizeof(float));
  }

 private:
  [[nodiscard]] std::size_t heads() const { return static_cast<std::size_t>(manifest_.kv_heads); }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(manifest_.head_dim); }
  [[nodiscard]] std::size_t capacity() const { return static_cast<std::size_t>(manifest_.info.capacity); }
  [[nodiscard]] std::size_t row_floats() const { return heads() * capacity() * dim(); }

  void write(std::vector<float>& mirror, const Call& call, const std::vector<float>& part) const {
    const auto width = static_cast<std::size_t>(call.width());
    for (std::size_t b = 0; b < static_cast<std::size_t>(call.rows()); ++b) {
      const auto slot = static_cast<std::size_t>(call.ints("write_indices")[b]);
      for (std::size_t h = 0; h < heads(); ++h) {
        const float* from = part.data() + (b * heads() + h) * width * dim();
        std::memcpy(mirror.data() + ((b * heads() + h) * capacity() + slot) * dim(), from,
                    width * dim() * sizeof(float));
      }
    }
  }

  template <typename T>
  std::vector<T> read(std::size_t count) {
    std::vector<T> values(count);
    file_.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(T)));
    if (!file_) throw std::runtime_error("the recording is too short, or not there");
    return values;
  }

  const Manifest& manifest_;
  std::ifstream file_;
  std::int64_t steps_ = 0;
  std::int64_t step_ = 0;
  std::vector<std::vector<float>> mirror_;
};

}  // namespace

Network recorded_network(const Manifest& manifest, const std::string& path) {
  const auto recording = std::make_shared<Recording>(manifest, path);
  return [recording](const Call& call) { recording->step(call); };
}

}  // namespace stand_in

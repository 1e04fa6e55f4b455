// bench ENGINE [--prompt-tokens N] [--new-tokens N] [--threads N] [--fast-start] [--json]: how fast an engine runs
// here, and the memory it takes.
//
// Measures and prints the same as `qwenport bench`, on the same prompt and in the same order (engines/measuring.py).
#include <qwenport/qwenport.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iostream>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int default_prompt = 512, default_new = 64, warmup = 4, prefills = 3, span_multiple = 64;
constexpr char usage[] =
    "usage: bench ENGINE [--prompt-tokens N] [--new-tokens N] [--threads N] [--fast-start] [--json]";

struct Request {
  std::string engine;
  std::optional<int> prompt_tokens, new_tokens, threads;
  bool fast_start = false, json = false;
};

int count_of(const std::string& option, const char* text) {
  std::size_t used = 0;
  int count = 0;
  try {
    count = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || text[used] != '\0' || count < 1) {
    throw std::runtime_error(option + ": '" + text + "' is not a whole number of at least 1");
  }
  return count;
}

Request parse(int argc, char** argv) {
  Request request;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    std::optional<int>* number = nullptr;
    if (word == "--prompt-tokens") number = &request.prompt_tokens;
    if (word == "--new-tokens") number = &request.new_tokens;
    if (word == "--threads") number = &request.threads;
    if (number != nullptr) {
      if (++i == argc) throw std::runtime_error(word + " needs a number");
      *number = count_of(word, argv[i]);
    } else if (word == "--fast-start") {
      request.fast_start = true;
    } else if (word == "--json") {
      request.json = true;
    } else if (word.rfind("--", 0) != 0 && request.engine.empty()) {
      request.engine = word;
    } else {
      throw std::runtime_error("unexpected " + word + "; " + usage);
    }
  }
  if (request.engine.empty()) throw std::runtime_error(usage);
  return request;
}

struct Time {
  double seconds = 0;
  double cpu_seconds = 0;  // of all threads of the process
};

class Clock {
 public:
  [[nodiscard]] Time read() const {
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - wall_;
    return {wall.count(), static_cast<double>(std::clock() - cpu_) / CLOCKS_PER_SEC};
  }

 private:
  std::chrono::steady_clock::time_point wall_ = std::chrono::steady_clock::now();
  std::clock_t cpu_ = std::clock();
};

/// What follows a key and a colon in a file of the system; empty if it is not there.
std::string system_value(const char* file, const std::string& key) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    const auto colon = line.find(':');
    if (line.rfind(key, 0) != 0 || colon == std::string::npos) continue;
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

std::optional<long long> memory(const char* key) {
  const std::string value = system_value("/proc/self/status", key);
  if (value.empty()) return std::nullopt;
  return std::stoll(value) * 1024;  // "1234 kB"
}

/// The release of the onnxruntime that this process has loaded, from its file's name; else `oldest`.
std::string onnxruntime_version(const std::string& oldest) {
  std::ifstream maps("/proc/self/maps");
  const std::string name = "/libonnxruntime.so.";
  for (std::string line; std::getline(maps, line);) {
    const auto at = line.find(name);
    if (at != std::string::npos) return line.substr(at + name.size());
  }
  return oldest + " or newer";
}

int argmax(const qwenport::Logits& logits) {
  const float* row = logits.row(0);
  return static_cast<int>(std::max_element(row, row + logits.vocab_size()) - row);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

struct Measured {
  int prompt_tokens = 0, new_tokens = 0;
  Time load, first_request;
  std::vector<double> first_token, prefill, prefill_cpu, decode, decode_cpu;
  std::optional<long long> loaded_bytes, peak_bytes;
  std::vector<qwenport::Token> tokens;
};

/// A prompt in an empty session; the first new token.
qwenport::Token request_of(qwenport::Session& session, const std::vector<qwenport::Token>& prompt,
                           Time& prefill, Time& first_token) {
  session.reset();
  const Clock clock;
  const auto logits = session.prefill(prompt);
  prefill = clock.read();
  const qwenport::Token token = argmax(logits);
  first_token = clock.read();
  return token;
}

void lengths(const Request& request, int longest, Measured& measured) {
  const int room = std::max(longest - request.prompt_tokens.value_or(1), 1);
  const int steps = request.new_tokens.value_or(std::min({default_new, longest / 2, room}));
  const int prompt = request.prompt_tokens.value_or(std::min(default_prompt, std::max(longest - steps, 1)));
  if (steps < 1 || prompt > longest || steps > longest - prompt) {
    throw std::runtime_error("a prompt of " + std::to_string(prompt) + " and " + std::to_string(steps) +
                             " new tokens: at least 1 each, and together at most the engine's " +
                             std::to_string(longest) + " positions");
  }
  measured.prompt_tokens = prompt;
  measured.new_tokens = steps;
}

Measured measure(const Request& request, qwenport::EngineInfo& info) {
  Measured measured;
  qwenport::EngineOptions options;
  options.threads = request.threads.value_or(0);
  options.load = request.fast_start ? qwenport::LoadMode::fast_start : qwenport::LoadMode::fast_steps;
  const Clock load;
  const auto engine = qwenport::Engine::load(request.engine, options);
  info = engine.info();
  lengths(request, info.capacity, measured);
  const int needed = measured.prompt_tokens + measured.new_tokens;
  qwenport::SessionOptions session_options;
  session_options.capacity =
      std::min(info.capacity, (needed + span_multiple - 1) / span_multiple * span_multiple);
  qwenport::Session session(engine, session_options);
  measured.load = load.read();
  measured.loaded_bytes = memory("VmRSS");

  std::vector<qwenport::Token> prompt(static_cast<std::size_t>(measured.prompt_tokens));
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<qwenport::Token>((13 + 7919 * i) % static_cast<std::size_t>(info.vocab_size));
  }
  Time prefill;
  Time first_token;
  qwenport::Token token = request_of(session, prompt, prefill, measured.first_request);
  for (int step = 0; step < std::min(warmup, measured.new_tokens); ++step) {
    token = argmax(session.decode(token));
  }
  for (int i = 0; i < prefills; ++i) {
    token = request_of(session, prompt, prefill, first_token);
    measured.first_token.push_back(first_token.seconds);
    measured.prefill.push_back(prefill.seconds);
    measured.prefill_cpu.push_back(prefill.cpu_seconds);
  }
  for (int step = 0; step < measured.new_tokens; ++step) {
    measured.tokens.push_back(token);
    const Clock clock;
    token = argmax(session.decode(token));
    const Time time = clock.read();
    measured.decode.push_back(time.seconds);
    measured.decode_cpu.push_back(time.cpu_seconds);
  }
  measured.peak_bytes = memory("VmHWM");
  return measured;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

template <class T>
std::string or_null(const std::optional<T>& value) {
  return value ? std::to_string(*value) : "null";
}

std::string megabytes(const std::optional<long long>& bytes) {
  if (!bytes) return "unknown";
  std::ostringstream text;
  text.precision(1);
  text << std::fixed;
  if (*bytes < 1000000000) {
    text << static_cast<double>(*bytes) / 1e6 << " MB";
  } else {
    text << static_cast<double>(*bytes) / 1e9 << " GB";
  }
  return text.str();
}

void print(const Request& request, const qwenport::EngineInfo& info, Measured& measured) {
  const bool on_cpu = info.flavour == "onnxruntime";
  const std::string runtime = on_cpu ? onnxruntime_version(info.runtime_version) : info.runtime_version;
  const std::string mode = request.fast_start ? "fast_start" : "fast_steps";
  const std::string cpu = system_value("/proc/cpuinfo", "model name");
  const unsigned cores = std::thread::hardware_concurrency();
  const double prefill = median(measured.prefill);
  const double decode = median(measured.decode);
  std::sort(measured.decode.begin(), measured.decode.end());
  const std::size_t tail = (measured.decode.size() - 1) / 10;
  const double p10 = measured.decode[tail];
  const double p90 = measured.decode[measured.decode.size() - 1 - tail];
  const double decode_cpu =
      std::accumulate(measured.decode_cpu.begin(), measured.decode_cpu.end(), 0.0) / measured.new_tokens;
  if (!request.json) {
    std::printf("%s %s, C++%s, qwenport %s\n", info.flavour.c_str(), runtime.c_str(),
                on_cpu ? (", " + mode).c_str() : "", QWENPORT_VERSION);
    std::printf("%s, %u cores, threads: %s\n", cpu.c_str(), cores,
                request.threads ? std::to_string(*request.threads).c_str() : "default");
    std::printf("prompt of %d tokens, %d new tokens\n", measured.prompt_tokens, measured.new_tokens);
    std::printf("load                 %.3f s\n", measured.load.seconds);
    std::printf("time to first token  %.3f s (first request %.3f s)\n", median(measured.first_token),
                measured.first_request.seconds);
    std::printf("prefill              %.1f tokens/s\n", measured.prompt_tokens / prefill);
    std::printf("decode               %.1f tokens/s (%.2f ms, 10th to 90th percentile %.2f to %.2f ms)\n",
                1 / decode, 1e3 * decode, 1e3 * p10, 1e3 * p90);
    std::printf("memory               %s after the load, %s at most\n",
                megabytes(measured.loaded_bytes).c_str(), megabytes(measured.peak_bytes).c_str());
    return;
  }
  std::ostringstream tokens;
  for (const auto token : measured.tokens) tokens << (tokens.tellp() > 0 ? ", " : "") << token;
  std::cout.precision(9);
  std::cout << "{\n \"target\": " << quoted(request.engine) << ",\n \"language\": \"C++\""
            << ",\n \"load_mode\": " << (on_cpu ? quoted(mode) : "null")
            << ",\n \"qwenport_version\": " << quoted(QWENPORT_VERSION) << ",\n \"cpu\": " << quoted(cpu)
            << ",\n \"cores\": " << cores << ",\n \"threads\": " << or_null(request.threads)
            << ",\n \"flavour\": " << quoted(info.flavour) << ",\n \"runtime_version\": " << quoted(runtime)
            << ",\n \"dtype\": " << quoted(info.dtype) << ",\n \"prompt_tokens\": " << measured.prompt_tokens
            << ",\n \"new_tokens\": " << measured.new_tokens
            << ",\n \"load_seconds\": " << measured.load.seconds
            << ",\n \"load_cpu_seconds\": " << measured.load.cpu_seconds
            << ",\n \"first_request_seconds\": " << measured.first_request.seconds
            << ",\n \"first_token_seconds\": " << median(measured.first_token)
            << ",\n \"prefill_tokens_per_second\": " << measured.prompt_tokens / prefill
            << ",\n \"prefill_cpu_seconds\": " << median(measured.prefill_cpu)
            << ",\n \"decode_tokens_per_second\": " << 1 / decode << ",\n \"decode_seconds\": " << decode
            << ",\n \"decode_p10_seconds\": " << p10 << ",\n \"decode_p90_seconds\": " << p90
            << ",\n \"decode_cpu_seconds\": " << decode_cpu
            << ",\n \"loaded_bytes\": " << or_null(measured.loaded_bytes)
            << ",\n \"peak_bytes\": " << or_null(measured.peak_bytes) << ",\n \"token_ids\": ["
            << tokens.str() << "]\n}\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Request request = parse(argc, argv);
    qwenport::EngineInfo info;
    Measured measured = measure(request, info);
    print(request, info, measured);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

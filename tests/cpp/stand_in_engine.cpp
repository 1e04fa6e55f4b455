// Engine::load of the stand-in: a directory with a recording is played back, any other is the toy network.
// In the library that Python loads, and in the programs that replay.
#include <fstream>

#include "stand_in.hpp"

using qwenport::detail::Manifest;

qwenport::Engine qwenport::Engine::load(const std::string& directory, const EngineOptions& options) {
  Manifest manifest = detail::read_manifest(directory);
  const auto shared = std::make_shared<const Manifest>(manifest);
  const std::string recording = directory + "/recording.bin";
  const bool recorded = std::ifstream(recording).good();
  return Engine(
      std::make_shared<const stand_in::StandInModel>(
          std::move(manifest),
          [=] {
            const stand_in::Network network =
                recorded ? stand_in::recorded_network(*shared, recording) : stand_in::toy_network(*shared);
            return stand_in::Network([shared, network](const stand_in::Call& call) { network(call); });
          }),
      directory, options.require_self_test);
}

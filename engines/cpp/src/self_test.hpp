// Engine::self_test: the engine's proof, run through a session; and whether sessions may be made.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "backend.hpp"
#include "files.hpp"
#include "proof.hpp"

namespace qwenport::detail {

/// Run a proof's cases, those that the engine has rows and slots for, up to the first wrong logits.
/// \param where the engine, for messages.
/// \throws Error bad_engine (another package's proof), not_proven (no case fits), and what a session throws.
SelfTestReport run_proof(const std::shared_ptr<const Model>& model, const Proof& proof,
                         const std::string& where);

/// The self-test of a loaded engine: what all its handles share. May be used from several threads.
class SelfTest {
 public:
  /// \param required sessions need a pass. \throws Error bad_engine: the proof cannot be read.
  SelfTest(std::shared_ptr<const Model> model, std::string directory, bool required);

  /// Run the proof, and remember whether it passed. \throws what run_proof throws, bad_engine, not_proven (no proof).
  SelfTestReport run();
  /// Before a session is made. \throws Error not_proven: a pass is required and there is none.
  void check_allowed();

 private:
  [[nodiscard]] std::string path() const;

  std::shared_ptr<const Model> model_;
  std::string directory_;
  bool required_;
  std::optional<MappedFile> file_;  // none: the engine carries no proof
  std::mutex mutex_;
  std::optional<bool> passed_;  // in this process
};

}  // namespace qwenport::detail

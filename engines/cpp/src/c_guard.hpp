// What the functions of the C API share: no exception leaves one, and pointers that are NULL are refused by name.
#pragma once

#include <exception>
#include <initializer_list>
#include <new>
#include <string>
#include <utility>

#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// Store this thread's last error message. \return the code as a number.
int keep_error(ErrorCode code, const char* text) noexcept;

/// Run something; 0, or the code of its exception, whose message is stored.
template <typename Work>
int guarded(const Work& work) noexcept {
  try {
    work();
    return 0;
  } catch (const Error& error) {
    return keep_error(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return keep_error(ErrorCode::internal, "out of host memory");
  } catch (const std::exception& error) {
    return keep_error(ErrorCode::internal, error.what());
  } catch (...) {
    return keep_error(ErrorCode::internal, "an unknown exception");
  }
}

/// Refuse pointers that are NULL, by their names.
inline void need(std::initializer_list<std::pair<std::string, const void*>> pointers) {
  for (const auto& [name, pointer] : pointers) {
    if (pointer == nullptr) throw Error(ErrorCode::invalid_argument, name + " is NULL");
  }
}

}  // namespace qwenport::detail

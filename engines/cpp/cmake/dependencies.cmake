# What the runtime is compiled with: Python's contract, nlohmann/json and, for TensorRT, its headers and CUDA. What is missing
# is named. Afterwards QWENPORT_ONNXRUNTIME and QWENPORT_TENSORRT are true or false here, whatever the cache says, and
# tensorrt_flavour is the TensorRT to run.

find_file(QWENPORT_CONTRACT contract.cmake NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE
  PATHS ${CMAKE_CURRENT_SOURCE_DIR}/../.. ${CMAKE_CURRENT_SOURCE_DIR}/../../qwenport)
if(NOT QWENPORT_CONTRACT)
  message(FATAL_ERROR "qwenport/contract.cmake was not found: compile in a whole checkout or in an installed package")
endif()
include(${QWENPORT_CONTRACT})

find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp DOC "the folder of nlohmann/json.hpp")
if(NOT NLOHMANN_JSON_INCLUDE_DIR)
  message(FATAL_ERROR "nlohmann/json was not found (only its headers are needed, and only to compile). On "
    "Debian and Ubuntu: apt-get install nlohmann-json3-dev. Else say where it is: "
    "-DNLOHMANN_JSON_INCLUDE_DIR=/path/to/include")
endif()

if(NOT QWENPORT_ONNXRUNTIME MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "QWENPORT_ONNXRUNTIME is '${QWENPORT_ONNXRUNTIME}'; it is AUTO, ON or OFF")
endif()
if(NOT QWENPORT_TENSORRT MATCHES "^(AUTO|ON|RTX|OFF)$")
  message(FATAL_ERROR "QWENPORT_TENSORRT is '${QWENPORT_TENSORRT}'; it is AUTO, ON (TensorRT), RTX (TensorRT-RTX) or OFF")
endif()

# onnxruntime is loaded with dlopen, so that every Unix can have it.
if(QWENPORT_ONNXRUNTIME STREQUAL "AUTO")
  set(QWENPORT_ONNXRUNTIME ${UNIX})
elseif(QWENPORT_ONNXRUNTIME AND NOT UNIX)
  message(FATAL_ERROR "QWENPORT_ONNXRUNTIME=ON: the library is loaded with dlopen, which this system does not have")
endif()

# TensorRT: asked for, by name or by its headers' folder, it must be complete; otherwise it is left out if it is not.
set(tensorrt_flavour)
set(tensorrt_missing)
if(QWENPORT_TENSORRT STREQUAL "OFF")
  set(tensorrt_missing "-DQWENPORT_TENSORRT=OFF")
else()
  set(tensorrt_asked ${QWENPORT_TENSORRT})
  if(NOT TENSORRT_INCLUDE_DIR)
    find_path(found_tensorrt_include NvInfer.h NO_CACHE)
    if(found_tensorrt_include)
      set(TENSORRT_INCLUDE_DIR ${found_tensorrt_include})
    endif()
  elseif(QWENPORT_TENSORRT STREQUAL "AUTO")
    set(tensorrt_asked ON)
  endif()
  find_package(CUDAToolkit 12.5 QUIET)
  if(NOT EXISTS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h")
    set(tensorrt_missing "The headers of TensorRT were not found. Say where they are: \
-DTENSORRT_INCLUDE_DIR=/path/to/include (the folder of NvInfer.h)")
  elseif(NOT CUDAToolkit_FOUND)
    set(tensorrt_missing "No CUDA toolkit of version 12.5 or newer was found. Install one \
(https://developer.nvidia.com/cuda-downloads) or say where it is: -DCUDAToolkit_ROOT=/usr/local/cuda")
  else()
    # The two flavours have one namespace and different virtual tables: a mix compiles, and crashes.
    file(STRINGS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h" rtx_lines REGEX "define +TRT_MAJOR_RTX")
    set(tensorrt_flavour tensorrt)
    if(rtx_lines)
      set(tensorrt_flavour tensorrt-rtx)
    endif()
    if(QWENPORT_TENSORRT STREQUAL "ON" AND rtx_lines)
      message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has the headers of TensorRT-RTX. Give those of TensorRT, or "
        "configure with -DQWENPORT_TENSORRT=RTX")
    elseif(QWENPORT_TENSORRT STREQUAL "RTX" AND NOT rtx_lines)
      message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has the headers of TensorRT. Give those of TensorRT-RTX, or "
        "configure with -DQWENPORT_TENSORRT=ON")
    endif()
  endif()
  if(tensorrt_missing AND NOT tensorrt_asked STREQUAL "AUTO")
    message(FATAL_ERROR "${tensorrt_missing}; or leave TensorRT out: -DQWENPORT_TENSORRT=OFF")
  endif()
endif()
if(tensorrt_flavour)
  set(QWENPORT_TENSORRT TRUE)
else()
  set(QWENPORT_TENSORRT FALSE)
endif()

if(NOT QWENPORT_ONNXRUNTIME AND NOT QWENPORT_TENSORRT)
  message(FATAL_ERROR "Neither onnxruntime nor TensorRT: such a library could run no engine. Configure with "
    "-DQWENPORT_ONNXRUNTIME=ON or -DQWENPORT_TENSORRT=ON")
endif()
if(QWENPORT_ONNXRUNTIME)
  message(STATUS "qwenport: onnxruntime engines: yes")
else()
  message(STATUS "qwenport: onnxruntime engines: no")
endif()
if(QWENPORT_TENSORRT)
  message(STATUS "qwenport: ${tensorrt_flavour} engines: yes, with ${TENSORRT_INCLUDE_DIR} and CUDA ${CUDAToolkit_VERSION}")
else()
  message(STATUS "qwenport: TensorRT engines: no. ${tensorrt_missing}")
endif()

# What the runtime is compiled with: Python's contract, CUDA, TensorRT's headers, nlohmann/json. What is missing is named.

find_file(QWENPORT_CONTRACT contract.cmake NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE
  PATHS ${CMAKE_CURRENT_SOURCE_DIR}/../.. ${CMAKE_CURRENT_SOURCE_DIR}/../../qwenport)
if(NOT QWENPORT_CONTRACT)
  message(FATAL_ERROR "qwenport/contract.cmake was not found: compile in a whole checkout or in an installed package")
endif()
include(${QWENPORT_CONTRACT})

find_package(CUDAToolkit 12.5 QUIET)
if(NOT CUDAToolkit_FOUND)
  message(FATAL_ERROR "No CUDA toolkit of version 12.5 or newer was found. Install one "
    "(https://developer.nvidia.com/cuda-downloads) or say where it is: -DCUDAToolkit_ROOT=/usr/local/cuda")
endif()

find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp DOC "the folder of nlohmann/json.hpp")
if(NOT NLOHMANN_JSON_INCLUDE_DIR)
  message(FATAL_ERROR "nlohmann/json was not found (only its headers are needed, and only to compile). On "
    "Debian and Ubuntu: apt-get install nlohmann-json3-dev. Else say where it is: "
    "-DNLOHMANN_JSON_INCLUDE_DIR=/path/to/include")
endif()

if(NOT QWENPORT_TENSORRT MATCHES "^(tensorrt|tensorrt-rtx)$")
  message(FATAL_ERROR "QWENPORT_TENSORRT is '${QWENPORT_TENSORRT}'; it is tensorrt or tensorrt-rtx")
endif()
if(NOT TENSORRT_INCLUDE_DIR)
  find_path(found_tensorrt_include NvInfer.h NO_CACHE)
  if(found_tensorrt_include)
    set(TENSORRT_INCLUDE_DIR ${found_tensorrt_include} CACHE PATH "" FORCE)
  endif()
endif()
if(NOT EXISTS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h")
  message(FATAL_ERROR "The headers of ${QWENPORT_TENSORRT} were not found. Say where they are: "
    "-DTENSORRT_INCLUDE_DIR=/path/to/include (the folder of NvInfer.h)")
endif()

# The two flavours have one namespace and different virtual tables: a mix compiles, and crashes.
file(STRINGS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h" rtx_lines REGEX "define +TRT_MAJOR_RTX")
if(rtx_lines AND QWENPORT_TENSORRT STREQUAL "tensorrt")
  message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has the headers of TensorRT-RTX. Give those of TensorRT, or "
    "configure with -DQWENPORT_TENSORRT=tensorrt-rtx")
elseif(NOT rtx_lines AND QWENPORT_TENSORRT STREQUAL "tensorrt-rtx")
  message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has the headers of TensorRT. Give those of TensorRT-RTX, or "
    "configure with -DQWENPORT_TENSORRT=tensorrt")
endif()

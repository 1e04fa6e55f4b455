# contract.hpp, generated from contract.py: what Python and C++ agree on. QWENPORT_CONTRACT_DIR is its folder;
# QWENPORT_PLUGIN_GPUS and QWENPORT_OLDEST_PLUGIN_GPU are compute capabilities, without a dot.
find_package(Python3 3.9 COMPONENTS Interpreter)
if(NOT Python3_Interpreter_FOUND)
  message(FATAL_ERROR "Python 3.9 or newer was not found (only to compile). Say where it is: "
    "-DPython3_EXECUTABLE=/path/to/python3")
endif()
set(QWENPORT_CONTRACT_DIR ${CMAKE_CURRENT_BINARY_DIR}/contract)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/contract.py)
execute_process(
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/contract.py
  OUTPUT_VARIABLE qwenport_contract
  COMMAND_ERROR_IS_FATAL ANY)
file(CONFIGURE OUTPUT ${QWENPORT_CONTRACT_DIR}/contract.hpp CONTENT "${qwenport_contract}" @ONLY)
string(REGEX MATCH "plugin_gpus\\[\\] = \"([0-9;]+)\"" matched "${qwenport_contract}")
set(QWENPORT_PLUGIN_GPUS ${CMAKE_MATCH_1})
string(REGEX MATCH "oldest_plugin_gpu = ([0-9]+)" matched "${qwenport_contract}")
set(QWENPORT_OLDEST_PLUGIN_GPU ${CMAKE_MATCH_1})

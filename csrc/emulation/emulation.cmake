# _emulated and _emulated_check: the CUDA sources executed on a CPU, for tests. Needs a C++ compiler and the headers
# cuda_fp16.h, cuda_bf16.h and vector_types.h (CNNFAST_CUDA_INCLUDE), no CUDA compiler.
#
# Included by csrc/CMakeLists.txt; nothing here names an operation.

if(CNNFAST_CUDA)
  message(FATAL_ERROR "CNNFAST_CUDA and CNNFAST_EMULATION compile the same files in two languages: use two build folders.")
endif()

if(NOT CNNFAST_CUDA_INCLUDE)
  # A toolkit first, then the headers as PyPI's wheels lay them out.
  set(candidates "$ENV{CUDA_HOME}/include" "$ENV{CUDA_PATH}/include" /usr/local/cuda/include)
  find_program(cnnfast_nvcc nvcc)
  if(cnnfast_nvcc)
    get_filename_component(real "${cnnfast_nvcc}" REALPATH)
    get_filename_component(bin "${real}" DIRECTORY)
    list(APPEND candidates "${bin}/../include")
  endif()
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE site OUTPUT_STRIP_TRAILING_WHITESPACE)
  file(GLOB wheels "${site}/nvidia/cu[0-9]*/include")
  list(APPEND candidates ${wheels})
  foreach(candidate IN LISTS candidates)
    if(EXISTS "${candidate}/cuda_bf16.h" AND EXISTS "${candidate}/crt/host_defines.h"
       AND (EXISTS "${candidate}/nv/target" OR EXISTS "${candidate}/cccl/nv/target"))
      set(CNNFAST_CUDA_INCLUDE "${candidate}" CACHE PATH "folder of cuda_fp16.h" FORCE)
      break()
    endif()
  endforeach()
endif()
if(NOT CNNFAST_CUDA_INCLUDE)
  message(FATAL_ERROR "The emulation needs cuda_fp16.h and crt/host_defines.h: install a CUDA toolkit, or "
                      "`pip install cuda-toolkit[nvcc,cudart,cccl]==13.0.3`, or set CNNFAST_CUDA_INCLUDE.")
endif()

file(GLOB emulated_kernels CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu")
file(GLOB emulation_runtime CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/*.cpp")
set_source_files_properties(${emulated_kernels} PROPERTIES LANGUAGE CXX)

set(CMAKE_STRIP "")  # the check variant names lines of source

# cnnfast_emulated_module(<name> CHECK <on or off>)
function(cnnfast_emulated_module name check)
  add_library(${name}_kernels OBJECT ${emulated_kernels})
  target_include_directories(${name}_kernels SYSTEM PRIVATE "${CNNFAST_CUDA_INCLUDE}" "${CNNFAST_CUDA_INCLUDE}/cccl")
  target_compile_options(${name}_kernels PRIVATE -x c++ -O2 -ffp-contract=fast -ftree-slp-vectorize -Wall -Wextra
                                                 -fno-strict-aliasing  # as nvcc compiles device code
                                                 -Wno-unknown-pragmas -Wno-builtin-declaration-mismatch)
  if(check)
    # Only compiled so: checker.cpp has the functions that the instrumentation calls, no sanitizer is linked.
    target_compile_options(
      ${name}_kernels PRIVATE -g1 -fsanitize=thread
                              -fsanitize=alignment,signed-integer-overflow,shift,bounds-strict,integer-divide-by-zero)
  endif()
  cnnfast_module(${name} ${emulation_runtime} $<TARGET_OBJECTS:${name}_kernels>)
  target_include_directories(${name} SYSTEM PRIVATE "${CNNFAST_CUDA_INCLUDE}" "${CNNFAST_CUDA_INCLUDE}/cccl")
  target_compile_definitions(${name} PRIVATE CNNFAST_MODULE_EXTRAS)
  target_compile_options(${name} PRIVATE -O2 -ftls-model=initial-exec -Wall -Wextra -Wno-builtin-declaration-mismatch)
  if(check)
    target_compile_definitions(${name} PRIVATE CNNFAST_EMULATION_CHECK)
  endif()
endfunction()

cnnfast_emulated_module(_emulated OFF)
cnnfast_emulated_module(_emulated_check ON)

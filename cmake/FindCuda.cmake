# Where CUDA is, in this order: what the environment names (CUDACXX, CUDA_HOME, CUDA_PATH); the PyPI packages that
# pyproject.toml names for OCTAVO_CUDA=1, which share the folder nvidia/cu13 of site-packages (before the system's toolkit,
# because their version is known); a toolkit on the path or in /usr/local/cuda.
#
#   octavo_find_cuda_headers()   sets OCTAVO_CUDA_INCLUDE: the folder of cuda_runtime.h
#   octavo_enable_cuda()         enables the language CUDA and finds CUDAToolkit
#
# Both stop with an error where there is none.

function(octavo_find_cuda_packages result)
  find_package(Python QUIET COMPONENTS Interpreter)
  set(found "")
  if(Python_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
roots = [pathlib.Path(path) / 'cu13' for path in (spec.submodule_search_locations if spec else [])]
roots.sort(key=lambda root: not (root / 'bin' / 'nvcc').exists())  # PyTorch brings the headers alone
print(next((root for root in roots if (root / 'include' / 'cuda_runtime.h').exists()), ''), end='')"
      OUTPUT_VARIABLE found)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

function(octavo_find_cuda_headers)
  octavo_find_cuda_packages(packages)
  find_program(OCTAVO_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  set(toolkit "")
  if(OCTAVO_NVCC)
    get_filename_component(toolkit "${OCTAVO_NVCC}" REALPATH)
    get_filename_component(toolkit "${toolkit}" DIRECTORY)
    get_filename_component(toolkit "${toolkit}" DIRECTORY)
  endif()
  find_path(OCTAVO_CUDA_INCLUDE cuda_runtime.h
            HINTS "${toolkit}" "${packages}" ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
            PATH_SUFFIXES include targets/x86_64-linux/include)
  if(NOT OCTAVO_CUDA_INCLUDE)
    message(FATAL_ERROR "octavo: no CUDA headers: install a CUDA toolkit, or the packages nvidia-cuda-runtime and "
                        "nvidia-cuda-crt of version 13.0 from PyPI")
  endif()
endfunction()

macro(octavo_enable_cuda)
  if(CMAKE_VERSION VERSION_LESS 3.26)
    message(FATAL_ERROR "octavo: OCTAVO_CUDA: expected CMake 3.26 or newer, which knows nvcc's C++20, got "
                        "${CMAKE_VERSION} (pip install cmake)")
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    set(_octavo_packages "")
    find_program(_octavo_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
    if(NOT _octavo_nvcc)
      octavo_find_cuda_packages(_octavo_packages)
      if(EXISTS "${_octavo_packages}/bin/nvcc")
        set(_octavo_nvcc "${_octavo_packages}/bin/nvcc")
        # The packages lack lib64 and libcudart.so, where nvcc and CMake look.
        string(APPEND CMAKE_CUDA_FLAGS_INIT " -L\"${_octavo_packages}/lib\"")
        set(CUDA_CUDART "${_octavo_packages}/lib/libcudart.so.13" CACHE FILEPATH "")
        message(STATUS "octavo: CUDA from PyPI packages in ${_octavo_packages}")
      endif()
    endif()
    if(NOT _octavo_nvcc)
      find_program(_octavo_nvcc nvcc PATHS /usr/local/cuda/bin NO_CACHE)
    endif()
    if(NOT _octavo_nvcc)
      message(FATAL_ERROR "octavo: OCTAVO_CUDA is on, but there is no nvcc: expected one named by CUDACXX, in CUDA_HOME, "
                          "on the path, in /usr/local/cuda, or the package nvidia-cuda-nvcc of version 13.0 from PyPI "
                          "(pip without --no-build-isolation installs it)")
    endif()
    set(CMAKE_CUDA_COMPILER "${_octavo_nvcc}" CACHE FILEPATH "")
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    message(FATAL_ERROR "octavo: OCTAVO_CUDA: expected nvcc 12.8 or newer, got ${CMAKE_CUDA_COMPILER_VERSION} "
                        "(${CMAKE_CUDA_COMPILER})")
  endif()
  find_package(CUDAToolkit 12.8 REQUIRED)
endmacro()

# jax_topk_find_nvcc(<path> <root> <why_not>)
#
# Finds a CUDA compiler that can build the kernels. Sets <path> to nvcc and <root> to the folder of
# its toolkit; where there is none, <path> is "" and <why_not> is a sentence.
#
# Order: the CUDACXX variable (taken or refused, never skipped), the packages nvidia-cuda-nvcc and
# companions from PyPI (nvidia/cu13 in the build environment), PATH, CUDA_HOME, /usr/local/cuda.

set(jax_topk_oldest_nvcc 12.9)  # the first that knows sm_100f and sm_120

# Sets <version> to "13.0" or so, or to "" where the compiler does not run.
function(jax_topk_nvcc_version version nvcc)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE code)
  set(${version} "" PARENT_SCOPE)
  if(code EQUAL 0 AND text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${version} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  endif()
endfunction()

# Sets <root> to the toolkit folder as nvcc sees it: nvcc may be a link or a script elsewhere.
function(jax_topk_nvcc_root root nvcc)
  execute_process(COMMAND "${nvcc}" --dryrun -c -x cu /dev/null -o /dev/null
    OUTPUT_VARIABLE text ERROR_VARIABLE text)
  set(${root} "" PARENT_SCOPE)
  if(text MATCHES "#\\$ TOP=([^\n]+)")
    string(STRIP "${CMAKE_MATCH_1}" top)
    get_filename_component(top "${top}" REALPATH)
    set(${root} "${top}" PARENT_SCOPE)
  endif()
endfunction()

# Sets <reason> to "" if <nvcc> can build the kernels, else to a sentence that says what it lacks.
# The PyPI compiler alone, as jax[cuda13] installs it for ptxas, has neither headers nor cudart.
function(jax_topk_check_nvcc reason root nvcc)
  jax_topk_nvcc_version(version "${nvcc}")
  jax_topk_nvcc_root(top "${nvcc}")
  set(${root} "${top}" PARENT_SCOPE)
  set(${reason} "" PARENT_SCOPE)
  if(NOT version)
    set(${reason} "${nvcc} does not run" PARENT_SCOPE)
  elseif(version VERSION_LESS jax_topk_oldest_nvcc)
    set(${reason} "${nvcc} is CUDA ${version}, older than ${jax_topk_oldest_nvcc}" PARENT_SCOPE)
  else()
    file(GLOB headers "${top}/include/cuda_runtime.h" "${top}/targets/*/include/cuda_runtime.h")
    file(GLOB cudart "${top}/lib64/libcudart_static.a" "${top}/lib/libcudart_static.a"
      "${top}/targets/*/lib/libcudart_static.a")
    if(NOT headers OR NOT cudart)
      set(${reason} "the toolkit of ${nvcc} lacks cuda_runtime.h or libcudart_static.a"
        PARENT_SCOPE)
    endif()
  endif()
endfunction()

function(jax_topk_find_nvcc path root why_not)
  set(${path} "" PARENT_SCOPE)
  set(${root} "" PARENT_SCOPE)

  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(jax_topk_cudacxx "$ENV{CUDACXX}" NO_CACHE)
    set(candidates "${jax_topk_cudacxx}")
    if(NOT jax_topk_cudacxx)
      set(${why_not} "CUDACXX=$ENV{CUDACXX} is not a program" PARENT_SCOPE)
      return()
    endif()
  else()
    set(candidates "")
    jax_topk_ask_python(nvidia_folders "import importlib.util as u; s = u.find_spec('nvidia'); \
print(';'.join(s.submodule_search_locations) if s else '')")
    foreach(folder IN LISTS nvidia_folders)
      file(GLOB found "${folder}/cu13/bin/nvcc")
      list(APPEND candidates ${found})
    endforeach()
    find_program(on_path nvcc NO_CACHE NO_CMAKE_PATH NO_CMAKE_ENVIRONMENT_PATH NO_CMAKE_SYSTEM_PATH)
    foreach(candidate "${on_path}" "$ENV{CUDA_HOME}/bin/nvcc" "/usr/local/cuda/bin/nvcc")
      if(EXISTS "${candidate}")
        list(APPEND candidates "${candidate}")
      endif()
    endforeach()
  endif()

  set(reasons "")
  foreach(candidate IN LISTS candidates)
    jax_topk_check_nvcc(reason top "${candidate}")
    if(NOT reason)
      set(${path} "${candidate}" PARENT_SCOPE)
      set(${root} "${top}" PARENT_SCOPE)
      return()
    endif()
    list(APPEND reasons "${reason}")
  endforeach()
  if(reasons)
    list(JOIN reasons "; " reasons)
    set(${why_not} "${reasons}" PARENT_SCOPE)
  else()
    set(${why_not} "there is no nvcc in this Python environment (nvidia-cuda-nvcc and its \
companions from PyPI), on PATH, in CUDA_HOME or in /usr/local/cuda" PARENT_SCOPE)
  endif()
endfunction()

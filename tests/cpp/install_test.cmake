# Installs octavo to a temporary prefix and builds and runs an example against the installation alone.
#
#   cmake -D BUILD=<build of octavo> -D EXAMPLE=<source folder> -D NAME=<its executable> -D WORK=<scratch folder>
#         -D GENERATOR=<cmake generator> -D LINK_FLAGS=<linker flags>
#         [-D TOOLCHAIN=<toolchain file>] [-D EMULATOR=<command that runs programs>] -P install_test.cmake
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\nfailed (${result}):\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${EXAMPLE} -B ${WORK}/build -G ${GENERATOR} -D CMAKE_PREFIX_PATH=${WORK}/prefix
    -D CMAKE_BUILD_TYPE=Release -D CMAKE_TOOLCHAIN_FILE=${TOOLCHAIN} "-D CMAKE_EXE_LINKER_FLAGS=${LINK_FLAGS}")
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${EMULATOR} ${WORK}/build/${NAME})
message("${output}")

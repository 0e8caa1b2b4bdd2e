# Fails when an object file of an ISA path defines a weak symbol outside the path's namespace: the
# linker keeps one of several, perhaps the one with instructions that the machine lacks.
#
#   cmake -DNM=nm -DNAMESPACE=avx512 "-DOBJECTS=a.o|b.o" -P check_symbols.cmake
string(REPLACE "|" ";" objects "${OBJECTS}")
string(LENGTH "${NAMESPACE}" length)
execute_process(COMMAND ${NM} ${objects} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+ [WVu] [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "9crosspool${length}${NAMESPACE}")
if(weak)
  list(JOIN weak "\n" weak)
  message(FATAL_ERROR "Another path's code could take the place of these:\n${weak}")
endif()

# dsv4_test(name SOURCES a.cpp ... LIBS lib ...): one GoogleTest binary; every case becomes a ctest of its own.
function(dsv4_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gtest_main)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE DSV4_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 TEST_PREFIX ${name}.)
endfunction()

# dsv4_fuzzer(name source LIBS lib ...): a libFuzzer binary.
function(dsv4_fuzzer name source)
  cmake_parse_arguments(ARG "" "" "LIBS" ${ARGN})
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
  target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()

# dsv4_isa_sources(target flags file...): files of one instruction set, compiled with its flags and chosen at run time.
function(dsv4_isa_sources target flags)
  target_sources(${target} PRIVATE ${ARGN})
  separate_arguments(flag_list UNIX_COMMAND "${flags}")
  set_source_files_properties(${ARGN} TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS "${flag_list}")
endfunction()

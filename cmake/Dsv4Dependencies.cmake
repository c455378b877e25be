# Libraries from the distribution's packages; NOTICE lists them with their licences.
find_package(Threads REQUIRED)
find_package(fmt 9 REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(CLI11 2.1 REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
if(DSV4_TESTS)
  find_package(GTest 1.12 REQUIRED)
endif()
if(DSV4_CUDA)
  enable_language(CUDA)
  find_package(CUDAToolkit 13 REQUIRED)
endif()

# Flags of every target. Contraction is off because a fused multiply-add changes bytes of the quantisation rules
# (codec/nvfp4.h); kernels that want FMA call it by name.
add_library(dsv4_flags INTERFACE)
target_compile_features(dsv4_flags INTERFACE cxx_std_20)
target_include_directories(dsv4_flags INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/src>
                                                $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
target_compile_options(dsv4_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers
                                            -ffp-contract=off>)
if(DSV4_WERROR)
  target_compile_options(dsv4_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(DSV4_SANITIZE)
  target_compile_options(dsv4_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${DSV4_SANITIZE}
                                              -fno-sanitize-recover=all -fno-omit-frame-pointer>)
  target_link_options(dsv4_flags INTERFACE -fsanitize=${DSV4_SANITIZE})
endif()

// The functions of prelude.cuh in the emulator.
#include "buffer.h"

#include "wrappers_test.h"

int main() { return test_wrappers() != 0; }

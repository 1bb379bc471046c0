// The attention kernels in the emulator: attention [SEEDS [FILTER]].
#include "buffer.h"

#include "attention_test.h"

int main(int argc, char** argv) {
    const int wrong = test_attention(argc > 1 ? atoi(argv[1]) : 1, argc > 2 ? argv[2] : "");
    return wrong + check_traffic() != 0;
}

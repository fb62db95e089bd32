/*
All programs of the workbench (dev/cuda) in one, for `make test`: the trainer, which each of them includes, is compiled
once.

    workbench NAME [ARGUMENT ...]     runs the main() of dev/cuda/NAME.cu with these arguments: workbench gelu -time
*/
#include <mma.h>
#include "../cuda/common.cuh"

namespace adamw_program {
#include "../cuda/adamw.cu"
}
namespace attention_program {
#include "../cuda/attention.cu"
}
#undef TOLERANCE
namespace dropit_select_program {
#include "../cuda/dropit_select.cu"
}
#undef PACKS
namespace dropit_unpack_program {
#include "../cuda/dropit_unpack.cu"
}
namespace gelu_program {
#include "../cuda/gelu.cu"
}
#undef TOLERANCE
namespace layernorm_program {
#include "../cuda/layernorm.cu"
}
#undef TOLERANCE

int main(int argc, char** argv) {
    const struct { const char* name; int (*run)(int, char**); } programs[] = {
        {"adamw", adamw_program::main},
        {"attention", attention_program::main},
        {"dropit_select", dropit_select_program::main},
        {"dropit_unpack", dropit_unpack_program::main},
        {"gelu", gelu_program::main},
        {"layernorm", layernorm_program::main}
    };
    for (const auto& program : programs) {
        if (argc > 1 && strcmp(argv[1], program.name) == 0) { return program.run(argc - 1, argv + 1); }
    }
    fprintf(stderr, "error: no program of the workbench is named %s\n", argc > 1 ? argv[1] : "(none given)");
    return EXIT_FAILURE;
}

// What the tests of the trainers' kernels and files, and the workbench, count: include it after the trainer
#include <stdarg.h>

static int passed, failed;

// counts a check; one that fails prints what it was
static void check(bool ok, const char* format, ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    if (!ok) { printf("NOT OK %s\n", what); }
    if (ok) { passed++; } else { failed++; }
}

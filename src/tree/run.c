#include "tree/run.h"

#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "vm/vm.h"

/* The text of src/tree/run.sh, in which @HOME@ stands for the VM's directory. */
__asm__(".pushsection .rodata\n"
        "run_script:\n"
        ".incbin \"" RUN_SCRIPT "\"\n"
        "run_script_end:\n"
        ".byte 0\n"
        ".popsection\n");
extern const char run_script[], run_script_end[];

bool run_print(struct vm *vm, struct buf *out) {
    static const char mark[] = "@HOME@";
    cleanup_buf struct buf home = {0};
    buf_printf(&home, "%s/%s", vm->daemon->settings.mountpoint, vm->id);
    const char *at = strstr(run_script, mark);
    if (home.failed || !at)
        return false;
    buf_append(out, run_script, (size_t)(at - run_script));
    env_quote(out, home.data, home.len);
    at += sizeof mark - 1;
    buf_append(out, at, (size_t)(run_script_end - at));
    return !out->failed;
}

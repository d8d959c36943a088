#pragma once

#include <stdbool.h>

#include "util/buf.h"

struct vm;

/* ID/run: a script for the host's sh that runs a command in the VM, by its jobs/. */
bool run_print(struct vm *vm, struct buf *out);

#pragma once

#include <stdbool.h>

#include "vmm/vmm.h"

/* A kernel is booted for nobody, to see whether that works here: KVM may be there, open, and boot
 * none. */

/* Boots the kernel of `config` without an initrd, until it looks for its root, which is as far as
 * it gets by itself; then the VMM is killed. Everything that it needs is in a folder of its own
 * below $TMPDIR or /tmp, which is removed.
 *
 * Returns 0 and the milliseconds that it took; -ENODEV when the kernel does not boot, within
 * `most_ms` or at all; any other -errno when it could not be tried. *ret_why is a sentence, or NULL
 * (the caller frees it). Blocks. A signal that ends this process ends the VMM, too; what it
 * starts afterwards dumps no core. */
int vmm_trial(const struct vmm_ops *ops, const struct vmm_config *config, unsigned most_ms,
              unsigned *ret_ms, char **ret_why);

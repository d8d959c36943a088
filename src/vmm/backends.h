#pragma once

/* The backends by name: NAME_ops (vmm/vmm.h) is its table. In the order in which "auto" tries them;
 * the second column says whether it does. */
#define VMM_BACKENDS(X)                                                                            \
    X(firecracker, true) X(cloud_hypervisor, true) X(qemu, true) X(attach, false)

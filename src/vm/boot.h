#pragma once

#include "vm/image.h"
#include "vm/vm.h"

/* What has to be done before the VMM of a VM can be started: read the image, make the host key and
 * the disk, write the initrd with what is particular to this VM. Done in the thread pool. */

struct vm_boot;

struct vm_boot_result {
    int status;
    char *why; /* a sentence: when status < 0 what is wrong, else why this backend */
    const struct vmm_ops *backend;
    struct image image;
    char *initrd;        /* of this VM */
    char *disk;          /* its file; NULL: none */
    struct buf host_key; /* public key blob */
};

/* Prepares a boot; vm->boot is set meanwhile. `done` is called once, also when the VM is gone by
 * then; the result is valid during the call. */
int boot_prepare(struct vm *vm, void (*done)(struct vm *vm, struct vm_boot_result *result));

struct vmm_config;

/* Fills in what the settings and the preparation say of the machine, borrowed from both. */
void boot_describe_vmm(const struct vm_config *config, const struct vm_boot_result *result,
                       struct vmm_config *vmm);

/* The public part of a key file of ssh-keygen: its blob (RFC 4253, section 6.6). Blocks shortly. */
int boot_read_public_key(const char *path, struct buf *ret_blob);

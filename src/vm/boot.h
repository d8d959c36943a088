#pragma once

#include "vm/image.h"
#include "vm/template.h"
#include "vm/vm.h"

/* What has to be done before the VMM of a VM can be started: read the image, make the host key and
 * the disk, write the initrd with what is particular to this VM. Done in the thread pool. */

struct vm_boot;
struct vmm_config;
struct warm_plan;

struct vm_boot_result {
    int status;
    char *why; /* a sentence: when status < 0 what is wrong, else why this backend */
    const struct vmm_ops *backend;
    struct image image;
    char *initrd;             /* of this VM */
    struct template template; /* what it starts from, instead of the initrd; without: a cold boot */
    struct warm_plan *plan;   /* if there could be such a template; owned */
    char *identity;           /* file, of a VM that starts from one */
    char *disk;               /* its file; NULL: none */
    struct buf host_key;      /* public key blob */
};

/* Prepares a boot; vm->boot is set meanwhile. `done` is called once, also when the VM is gone by
 * then; the result is valid during the call. */
int boot_prepare(struct vm *vm, void (*done)(struct vm *vm, struct vm_boot_result *result));

/* What the VMM is to boot, as far as the image and the settings say. `boot_args` is where the
 * command line is put together, and has to live as long as the configuration. */
void boot_configure(const struct settings *settings, const struct vm_config *vm,
                    const struct image *image, struct buf *boot_args,
                    struct vmm_config *ret_config);

/* vmm_find() for that. Blocks shortly. */
int boot_find_backend(const struct settings *settings, const struct vm_config *config,
                      const struct image *image, const struct vmm_ops **ret_backend,
                      char **ret_why);

/* The public part of a key file of ssh-keygen: its blob (RFC 4253, section 6.6). Blocks shortly. */
int boot_read_public_key(const char *path, struct buf *ret_blob);

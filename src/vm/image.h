#pragma once

#include "vm/daemon.h"

/* Images: folders with an image.json that says how to boot what else is in them. A VM's image is
 * named by its folder's name, looked for in image_search_path(), or by an absolute path.
 *
 *     {"os": "linux", "kernel": "vmlinuz", "initrd": "initrd.img", "boot_args": "…", "inject":
 * "cpio", "user": "root", "vcpus": 1, "memory": 128, "memory_min": 80, "ready": "…", "disk":
 * "overlay", "disk_initrd": "disk.img", "kernel_elf": "vmlinux", "vsock": 22}
 *
 * "inject": "cpio": the guest is an initramfs, and what is particular to a VM is a second cpio
 * archive.
 *
 * "vsock": the guest serves SSH at this port of its vsock, if it has one. "kernel_elf": what VMMs
 * boot that want no bzImage; it has to have an entry for PVH.
 *
 * "disk": "overlay": if there is a disk, the guest keeps on it what is written under `/`. The
 * initramfs has "disk_initrd" behind it then.
 *
 * "warm": "port": booted with a virtio port named vmsfs.identity, the guest waits there for the
 * archive that "inject" says, and is nobody until then; "warm_boot_args" are for that boot. */

struct image {
    char *path;            /* of the folder, absolute */
    char *kernel, *initrd; /* absolute */
    char *kernel_elf;      /* the same kernel as an ELF file, absolute; NULL: none */
    unsigned vsock_port;   /* where its SSH server is reached by vsock; 0: nowhere */
    bool disk;             /* it makes use of one */
    char *disk_initrd;     /* absolute; NULL: none */
    char *boot_args;
    char *user;
    bool warm;            /* it can be made a template of, and started from that */
    char *warm_boot_args; /* for the kernel of a template, behind boot_args */
    char *ready;          /* what the console says when the SSH server listens; empty: not known */
    unsigned vcpus, memory, memory_min;
};

/* Reads an image. On error *ret_why is a sentence with the remedy (the caller frees it). Blocks
 * shortly. */
int image_open(const struct settings *settings, const char *name, struct image *ret_image,
               char **ret_why);
void image_close(struct image *image);

/* Is this much memory (MiB; 0: what the image says) enough for the image called `name`? As
 * image_open() otherwise. */
int image_check_memory(const struct image *image, const char *name, unsigned memory,
                       char **ret_why);

/* Can the image called `name` have a disk of this size (MiB; 0: none)? As image_open() otherwise.
 */
int image_check_disk(const struct image *image, const char *name, unsigned disk, char **ret_why);

/* How the program is called that makes the image `tiny`: as it was installed with this one, or as
 * it is in the sources. A constant. */
const char *image_builder(const struct settings *settings);

/* The folders that images are looked for in, one a line, in their order. */
void image_search_path(const struct settings *settings, struct buf *out);

#include "vm/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "util/cleanup.h"
#include "util/cpio.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "util/random.h"
#include "vm/disk.h"
#include "vm/host_key.h"
#include "vm/machine.h"
#include "vm/vars.h"
#include "vm/warm.h"
#include "vmm/vmm.h"

/* Everything the worker thread uses is a copy, or constant for the life of the daemon. */
struct vm_boot {
    uv_work_t work;
    struct vm *vm; /* a reference */
    const struct settings *settings;
    struct vm_config config;
    char *id, *dir, *key_public;
    char *key_path;     /* to log in to an existing machine */
    char *bad_template; /* to be removed; NULL: none */
    bool cold;          /* no template is to be used */
    struct buf env;     /* the guest's env file */
    struct vm_boot_result result;
    void (*done)(struct vm *vm, struct vm_boot_result *result);
};

static int boot_fail(struct vm_boot *boot, const char *what, const char *path, int error) {
    free(boot->result.why);
    if (asprintf(&boot->result.why, "%s %s: %s", what, path, strerror(-error)) < 0)
        boot->result.why = NULL;
    return boot->result.status = error == -ENOSPC || error == -EDQUOT ? -ERR_NO_ROOM : -ERR_GONE;
}

int boot_read_public_key(const char *path, struct buf *ret_blob) {
    cleanup_buf struct buf text = {0};
    const char *wrong;
    int r = fs_read(path, 4096, &text);
    return r < 0 ? r : host_key_parse(text.data ? text.data : "", text.len, ret_blob, &wrong);
}

static bool boot_has_host_key(const char *path, const char *public_path) {
    cleanup_buf struct buf blob = {0};
    struct stat st;
    if (stat(path, &st) < 0 || st.st_size == 0)
        return false;
    int r = boot_read_public_key(public_path, &blob);
    return r != -ENOENT && r != -ERR_INVALID;
}

/* The host key is made once and stays with the VM: a client that has learned it finds it again. */
static int boot_host_key(struct vm_boot *boot, struct buf *ret_private) {
    cleanup_free char *path = NULL, *public_path = NULL, *known_hosts = NULL;
    cleanup_buf struct buf line = {0}, text = {0};
    if (asprintf(&path, "%s/ssh_host_ed25519_key", boot->dir) < 0 ||
        asprintf(&public_path, "%s.pub", path) < 0 ||
        asprintf(&known_hosts, "%s/known_hosts", boot->dir) < 0)
        return boot_fail(boot, "no memory for", boot->id, -ENOMEM);
    if (!boot_has_host_key(path, public_path)) {
        const char *const keygen[] = {"ssh-keygen", "-q",     "-t", "ed25519", "-N", "",
                                      "-C",         boot->id, "-f", path,      NULL};
        unlink(path); /* half of a pair, or what has become of one */
        unlink(public_path);
        int r = fs_run(keygen);
        if (r < 0)
            return boot_fail(boot, "ssh-keygen (package openssh-client) could not make", path, r);
    }
    int r = fs_read(path, 16384, ret_private);
    if (r == 0)
        r = boot_read_public_key(public_path, &boot->result.host_key);
    if (r == 0)
        r = fs_read(public_path, 4096, &text);
    if (r < 0)
        return boot_fail(boot, "cannot read the host key", path, r);
    buf_printf(&line, "%s %s", boot->id, text.data);
    r = line.failed ? -ENOMEM : fs_replace(known_hosts, 0600, line.data, line.len);
    return r < 0 ? boot_fail(boot, "cannot write", known_hosts, r) : 0;
}

#define BOOT_MACHINE_ID "etc/machine-id"

/* machine-id(5): a random UUID of version 4, made once, without a newline here. */
static int boot_machine_id(struct vm_boot *boot, char id[NONCE_LENGTH + 1]) {
    cleanup_free char *path = NULL;
    cleanup_buf struct buf text = {0};
    if (asprintf(&path, "%s/machine-id", boot->dir) < 0)
        return boot_fail(boot, "no memory for", boot->id, -ENOMEM);
    if (fs_read(path, NONCE_LENGTH, &text) == 0 && text.len == NONCE_LENGTH) {
        memcpy(id, text.data, NONCE_LENGTH);
        id[NONCE_LENGTH] = '\0';
        return 0;
    }
    int r = random_nonce(id);
    if (r == 0) {
        id[12] = '4';
        id[16] = "89ab"[id[16] & 3];
        r = fs_replace(path, 0600, id, NONCE_LENGTH);
    }
    return r < 0 ? boot_fail(boot, "cannot write", path, r) : 0;
}

/* What is particular to this VM (design, section 3: at boot), as archives. Whoever unpacks a folder
 * gives it the mode and the owner that the archive says, also if it is there already. So they are
 * in one of their own, for the kernel to unpack before those of the image: what the image has keeps
 * the image's. */
struct boot_archives {
    struct buf folders, files;
    struct buf injected; /* paths of the files, one a line */
};

static void boot_archives_free(struct boot_archives *archives) {
    struct buf *const bufs[] = {&archives->folders, &archives->files, &archives->injected};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) {
        if (bufs[i]->data)
            explicit_bzero(bufs[i]->data, bufs[i]->len);
        buf_free(bufs[i]);
    }
}
#define cleanup_archives __attribute__((cleanup(boot_archives_free)))

/* Where there is none yet: the key's folder is root's alone. */
static mode_t boot_folder_mode(const char *path) {
    return strcmp(path, "root") == 0 || strcmp(path, "root/.ssh") == 0 ? 0700 : 0755;
}

/* A file, with the folders above it. */
static int boot_add(struct boot_archives *archives, const char *path, mode_t mode, const char *data,
                    size_t length) {
    cleanup_free char *folder = strdup(path);
    int r = folder ? 0 : -ENOMEM;
    for (char *slash = folder; r == 0 && (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        r = cpio_add(&archives->folders, folder, S_IFDIR | boot_folder_mode(folder), NULL, 0);
        *slash = '/';
    }
    buf_printf(&archives->injected, "%s\n", path);
    return r < 0 ? r : cpio_add(&archives->files, path, S_IFREG | mode, data, length);
}

/* For a guest with a disk, which may have others of an earlier boot: the files of this boot. */
#define BOOT_INJECTED ".vmsfs-injected"

static int boot_archive(struct vm_boot *boot, const struct buf *host_key,
                        struct boot_archives *ret) {
    cleanup_buf struct buf hostname = {0};
    char machine_id[NONCE_LENGTH + 2];
    if (boot_machine_id(boot, machine_id) < 0)
        return boot->result.status;
    machine_id[NONCE_LENGTH] = '\n';
    buf_printf(&hostname, "%s\n", boot->id);
    const struct {
        const char *path;
        mode_t mode;
        const char *data;
        size_t length;
    } members[] = {
        {"etc/hostname", 0644, hostname.data, hostname.len},
        {BOOT_MACHINE_ID, 0444, machine_id, NONCE_LENGTH + 1},
        {"etc/ssh/ssh_host_ed25519_key", 0600, host_key->data, host_key->len},
        {"root/.ssh/authorized_keys", 0600, boot->key_public, strlen(boot->key_public)},
    };
    int r = 0;
    for (size_t i = 0; i < sizeof members / sizeof *members && r == 0; i++)
        r = boot_add(ret, members[i].path, members[i].mode, members[i].data, members[i].length);
    if (r == 0 && boot->env.len)
        r = boot_add(ret, boot->config.env_file + 1, 0644, boot->env.data, boot->env.len);
    if (r == 0 && boot->config.disk)
        r = ret->injected.failed ? -ENOMEM
                                 : cpio_add(&ret->files, BOOT_INJECTED, S_IFREG | 0600,
                                            ret->injected.data, ret->injected.len);
    cpio_end(&ret->folders);
    cpio_end(&ret->files);
    return r < 0 || ret->folders.failed || ret->files.failed
               ? boot_fail(boot, "no memory for", boot->id, -ENOMEM)
               : 0;
}

static int boot_copy(int from, int to) {
    for (;;) {
        ssize_t n = copy_file_range(from, NULL, to, NULL, 1 << 30, 0);
        if (n == 0)
            return 0;
        if (n < 0 && (errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP))
            break;
        if (n < 0 && errno != EINTR)
            return -errno;
    }
    char block[65536];
    for (;;) {
        ssize_t n = read(from, block, sizeof block);
        if (n <= 0)
            return n < 0 ? -errno : 0;
        for (ssize_t done = 0; done < n;) {
            ssize_t w = write(to, block + done, (size_t)(n - done));
            if (w < 0)
                return -errno;
            done += w;
        }
    }
}

/* The kernel takes several archives, one behind the other, as one initramfs; each starts at a
 * multiple of 4. */
static int boot_append(struct vm_boot *boot, int to, const char *path, const char *archive) {
    cleanup_close int from = open(archive, O_RDONLY | O_CLOEXEC);
    if (from < 0)
        return boot_fail(boot, "cannot read", archive, -errno);
    int r = boot_copy(from, to);
    off_t end = r == 0 ? lseek(to, 0, SEEK_END) : -1;
    if (r == 0 && (end < 0 || ftruncate(to, (end + 3) / 4 * 4) < 0 || lseek(to, 0, SEEK_END) < 0))
        r = -errno;
    return r < 0 ? boot_fail(boot, "cannot write", path, r) : 0;
}

static int boot_write(struct vm_boot *boot, int to, const char *path, const struct buf *data) {
    for (size_t done = 0; done < data->len;) {
        ssize_t n = write(to, data->data + done, data->len - done);
        if (n < 0)
            return boot_fail(boot, "cannot write", path, -errno);
        done += (size_t)n;
    }
    return 0;
}

static int boot_initrd(struct vm_boot *boot, const struct boot_archives *archives) {
    const struct image *image = &boot->result.image;
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/initrd", boot->dir) < 0)
        return boot_fail(boot, "no memory for", boot->id, -ENOMEM);
    unlink(path);
    cleanup_close int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (to < 0)
        return boot_fail(boot, "cannot write", path, -errno);
    if (boot_write(boot, to, path, &archives->folders) < 0 ||
        boot_append(boot, to, path, image->initrd) < 0 ||
        (boot->config.disk && image->disk_initrd &&
         boot_append(boot, to, path, image->disk_initrd) < 0) ||
        boot_write(boot, to, path, &archives->files) < 0) {
        unlink(path);
        return boot->result.status;
    }
    boot->result.initrd = path;
    path = NULL;
    return 0;
}

void boot_configure(const struct settings *settings, const struct vm_config *vm,
                    const struct image *image, struct buf *boot_args,
                    struct vmm_config *ret_config) {
    if (image->boot_args)
        buf_printf(boot_args, "%s%s%s%s", image->boot_args, settings->verbose_boot ? "" : " quiet",
                   vm->boot_args[0] ? " " : "", vm->boot_args);
    *ret_config = (struct vmm_config){
        .kernel = image->kernel,
        .kernel_elf = image->kernel_elf,
        .boot_args = boot_args->data,
        .vcpus = vm->vcpus ? vm->vcpus : image->vcpus,
        .memory = vm->memory ? vm->memory : image->memory,
        .cpu_model = vm->cpu_model,
        .vsock_port = image->vsock_port,
        .tap = vm->tap,
        .jail_user = vm->jail_user,
        .address = vm->address,
        .port = vm->port,
    };
}

int boot_find_backend(const struct settings *settings, const struct vm_config *config,
                      const struct image *image, const struct vmm_ops **ret_backend,
                      char **ret_why) {
    cleanup_buf struct buf boot_args = {0};
    struct vmm_config vmm;
    boot_configure(settings, config, image, &boot_args, &vmm);
    return boot_args.failed ? -ERR_NO_MEMORY
                            : vmm_find(config->backend, &vmm, ret_backend, ret_why);
}

/* What it runs in, and what is booted, with its disk, or attached. A backend that cannot work is
 * said before an image that is not there. */
static int boot_find(struct vm_boot *boot) {
    struct vm_boot_result *result = &boot->result;
    const struct vm_config *config = &boot->config;
    char *why = NULL;
    int r = vmm_find(config->backend, NULL, &result->backend, &result->why);
    if (r == 0 && !result->backend->existing) {
        r = image_open(boot->settings, config->image, &result->image, &why);
        if (r == 0)
            r = boot_find_backend(boot->settings, config, &result->image, &result->backend, &why);
        free(result->why);
        result->why = why;
        why = NULL;
    }
    if (r == 0 && result->backend->existing)
        r = machine_prepare(config, boot->key_path, &result->host_key, &why);
    if (r == 0 && !result->backend->existing)
        r = image_check_memory(&result->image, config->image, config->memory, &why);
    if (r == 0 && !result->backend->existing)
        r = image_check_disk(&result->image, config->image, config->disk, &why);
    if (r == 0 && !result->backend->existing && config->disk)
        r = disk_prepare(boot->dir, config->disk, &result->disk, &why);
    if (why) {
        free(result->why);
        result->why = why;
    }
    return result->status = r;
}

/* A template, if one may be used and fits; and what is to be made one of, if there could be one. A
 * VM with a disk has other devices, and of a verbose boot somebody wants to see everything. */
static void boot_find_template(struct vm_boot *boot) {
    struct vm_boot_result *result = &boot->result;
    cleanup_buf struct buf boot_args = {0};
    cleanup_free char *why = NULL;
    struct vmm_config config;
    if (boot->bad_template && fs_remove_all(boot->bad_template) < 0)
        log_error("cannot remove %s: %s", boot->bad_template, strerror(errno));
    if (!result->backend->templates || !result->image.warm || boot->config.disk ||
        boot->settings->verbose_boot || strcmp(boot->config.warm, "off") == 0 ||
        boot->cold) /* it has one, or one that was no good */
        return;
    boot_configure(boot->settings, &boot->config, &result->image, &boot_args, &config);
    if (boot_args.failed ||
        !(result->plan = warm_plan_new(result->backend, &config, &result->image)))
        return;
    int r = template_open(boot->settings->state_dir, &result->plan->key, &result->template, &why);
    if (r < 0 && r != -ENOENT)
        log_warn("%s: %s; it is removed, and the VM boots cold", boot->id,
                 why ? why : strerror(-r));
}

/* What an earlier boot of the other kind was told, with values that may be unset since. */
static int boot_forget(struct vm_boot *boot, const char *name) {
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/%s", boot->dir, name) < 0)
        return boot_fail(boot, "no memory for", boot->id, -ENOMEM);
    return unlink(path) < 0 && errno != ENOENT ? boot_fail(boot, "cannot remove", path, -errno) : 0;
}

/* What the guest of a template is told: the files that another one has behind its initrd. Its
 * folders are there already. */
static int boot_identity(struct vm_boot *boot, const struct buf *archive) {
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/identity", boot->dir) < 0)
        return boot_fail(boot, "no memory for", boot->id, -ENOMEM);
    int r = fs_replace_fast(path, 0600, archive->data, archive->len);
    if (r < 0)
        return boot_fail(boot, "cannot write", path, r);
    boot->result.identity = path;
    path = NULL;
    return 0;
}

/* What the backend itself has to do before. */
static void boot_prepare_vmm(struct vm_boot *boot) {
    struct vm_boot_result *result = &boot->result;
    cleanup_buf struct buf boot_args = {0};
    struct vmm_config config;
    char *why = NULL;
    boot_configure(boot->settings, &boot->config, &result->image, &boot_args, &config);
    config.id = boot->id;
    config.dir = boot->dir;
    config.initrd = result->initrd;
    config.disk = result->disk;
    if (!result->backend->prepare || result->backend->prepare(&config, &why) == 0)
        return;
    free(result->why);
    result->why = why;
    result->status = -ERR_GONE;
}

static void boot_work(uv_work_t *work) {
    struct vm_boot *boot = work->data;
    cleanup_buf struct buf host_key = {0};
    cleanup_archives struct boot_archives archives = {0};
    if (boot_find(boot) < 0 || boot->result.backend->existing ||
        boot_host_key(boot, &host_key) < 0 || boot_archive(boot, &host_key, &archives) < 0)
        return;
    boot_find_template(boot);
    bool warm = boot->result.template.dir;
    int r = boot_forget(boot, warm ? "initrd" : "identity");
    if (r == 0)
        r = warm ? boot_identity(boot, &archives.files) : boot_initrd(boot, &archives);
    if (r == 0)
        boot_prepare_vmm(boot);
    explicit_bzero(host_key.data, host_key.len);
}

static void boot_free(struct vm_boot *boot) {
    free(boot->id);
    free(boot->dir);
    config_free(&boot->config);
    free(boot->key_public);
    free(boot->key_path);
    buf_free(&boot->env);
    free(boot->result.why);
    free(boot->result.initrd);
    free(boot->result.identity);
    template_close(&boot->result.template);
    warm_plan_free(boot->result.plan);
    free(boot->bad_template);
    free(boot->result.disk);
    buf_free(&boot->result.host_key);
    image_close(&boot->result.image);
    free(boot);
}

static void boot_after(uv_work_t *work, int status) {
    struct vm_boot *boot = work->data;
    (void)status;
    boot->vm->boot = NULL;
    boot->done(boot->vm, &boot->result);
    vm_unref(boot->vm);
    boot_free(boot);
}

int boot_prepare(struct vm *vm, void (*done)(struct vm *vm, struct vm_boot_result *result)) {
    struct vm_boot *boot = calloc(1, sizeof *boot);
    if (!boot)
        return -ERR_NO_MEMORY;
    boot->vm = vm;
    boot->done = done;
    boot->settings = &vm->daemon->settings;
    boot->id = strdup(vm->id);
    boot->dir = strdup(vm->dir);
    boot->key_public = strdup(vm->daemon->key_public);
    boot->key_path = strdup(vm->config.key[0] ? vm->config.key : vm->daemon->key_path);
    boot->work.data = boot;
    warm_begin_boot(vm, &boot->bad_template, &boot->cold);
    int r = config_copy(&boot->config, &vm->config);
    if (r == 0)
        r = vars_inject(vm->vars, &boot->env);
    if (!boot->id || !boot->dir || !boot->key_public || !boot->key_path)
        r = -ERR_NO_MEMORY;
    if (r == 0)
        r = uv_queue_work(vm->daemon->loop, &boot->work, boot_work, boot_after);
    if (r < 0) {
        boot_free(boot);
        return r;
    }
    vm_ref(vm);
    vm->boot = boot;
    return 0;
}

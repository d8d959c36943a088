#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "doctor/internal.h"
#include "util/cleanup.h"
#include "vm/boot.h"
#include "vm/image.h"
#include "vmm/host.h"
#include "vmm/trial.h"
#include "vmm/vmm.h"

/* What guests are made of: backend, KVM, images. */

#define KVM_TRIAL_MS 15000 /* many times what a kernel takes with KVM */

/* With machines that exist already nothing is booted. */
static bool boots_guests(const struct doctor *d) {
    return !vmm_is_for_existing(d->settings->config.backend);
}

void doctor_check_backend(struct doctor *d) {
    const struct vmm_ops *backend;
    const char *name = d->settings->config.backend;
    cleanup_free char *why = NULL;
    if (vmm_find(name, NULL, &backend, &why) < 0)
        doctor_find(d, "backend", DOCTOR_BROKEN,
                    "install it, or name another with -o backend= (attach is for machines that "
                    "exist already)",
                    "%s: %s", name, why ? why : "does not work");
    else
        doctor_find(d, "backend", DOCTOR_OK, NULL, "%s: %s", backend->name, why ? why : "works");
}

/* Boots the kernel that new VMs start with, as they would be started with VMSFS_KVM=yes. As
 * vmm_trial(). */
static int kvm_try(const struct doctor *d, unsigned *ret_ms, char **ret_why) {
    const struct vm_config *settings = &d->settings->config;
    cleanup_buf struct buf boot_args = {0};
    cleanup_free char *note = NULL;
    const struct vmm_ops *backend;
    struct vmm_config config;
    struct image image;
    if (image_open(d->settings, settings->image, &image, ret_why) < 0)
        return -ENOENT;
    boot_configure(d->settings, settings, &image, &boot_args, &config);
    int status =
        boot_args.failed ? boot_args.failed : vmm_find(settings->backend, &config, &backend, &note);
    if (status < 0)
        *ret_why = note, note = NULL;
    else
        status = vmm_trial(backend, &config, KVM_TRIAL_MS, ret_ms, ret_why);
    image_close(&image);
    return status;
}

/* The same, whatever the CPU and the environment say. */
static int kvm_try_anyway(const struct doctor *d, unsigned *ret_ms, char **ret_why) {
    const char *told = getenv("VMSFS_KVM");
    cleanup_free char *before = told ? strdup(told) : NULL;
    setenv("VMSFS_KVM", "yes", 1);
    int status = kvm_try(d, ret_ms, ret_why);
    if (before)
        setenv("VMSFS_KVM", before, 1);
    else
        unsetenv("VMSFS_KVM");
    return status;
}

/* It is promised: whether it is true decides whether new VMs boot. */
static void kvm_check_promise(struct doctor *d) {
    const char *image = d->settings->config.image;
    cleanup_free char *why = NULL;
    unsigned ms = 0;
    int status = kvm_try_anyway(d, &ms, &why);
    if (status == 0)
        doctor_find(d, "kvm", DOCTOR_OK, NULL,
                    "guests run on the CPU itself: the kernel of %s boots with KVM, in %u ms",
                    image, ms);
    else if (status == -ENODEV)
        doctor_find(d, "kvm", DOCTOR_BROKEN,
                    "start the daemon with VMSFS_KVM=no in its environment: guests are emulated "
                    "then",
                    "KVM is there, and the kernel of %s does not boot with it: %s", image,
                    why ? why : "no memory");
    else
        doctor_find(d, "kvm", DOCTOR_WARNING, "mend that, and ask again",
                    "KVM is there; whether a kernel boots with it could not be tried: %s",
                    why ? why : strerror(-status));
}

/* Guests are emulated; is there reason to? */
static void kvm_check_refusal(struct doctor *d, const char *why) {
    static const char virtualize[] = "enable virtualization in the firmware, or nested "
                                     "virtualization where this machine is a guest itself";
    const char *image = d->settings->config.image;
    const char *comma = strstr(why, ", "); /* what to do about it stands behind */
    int length = (int)(comma ? (size_t)(comma - why) : strlen(why));
    const char *remedy = comma ? comma + 2 : virtualize;
    cleanup_free char *trial = NULL;
    unsigned ms = 0;
    int status = comma || !host_kvm_opens() ? -ENOENT : kvm_try_anyway(d, &ms, &trial);
    if (status == 0)
        doctor_find(d, "kvm", DOCTOR_WARNING,
                    "start the daemon with VMSFS_KVM=yes in its environment",
                    "guests are emulated, several times slower: %.*s; but the kernel of %s boots "
                    "with KVM, in %u ms",
                    length, why, image, ms);
    else if (status == -ENODEV)
        doctor_find(d, "kvm", DOCTOR_WARNING, remedy,
                    "guests are emulated, several times slower: %.*s; /dev/kvm can be opened, but "
                    "the kernel of %s does not boot with it: %s",
                    length, why, image, trial ? trial : "no memory");
    else
        doctor_find(d, "kvm", DOCTOR_WARNING, remedy,
                    "guests are emulated, several times slower: %.*s", length, why);
}

void doctor_check_kvm(struct doctor *d) {
    const char *why = "";
    bool kvm = host_has_kvm(&why);
    if (!boots_guests(d))
        doctor_find(d, "kvm", DOCTOR_OK, NULL, "not needed for machines that exist already");
    else if (kvm)
        kvm_check_promise(d);
    else
        kvm_check_refusal(d, why);
}

static void doctor_check_image(struct doctor *d, const char *name, bool wanted) {
    struct image image;
    cleanup_free char *why = NULL;
    if (image_open(d->settings, name, &image, &why) == 0) {
        doctor_find(d, "image", DOCTOR_OK, NULL, "%s is whole, in %s%s", name, image.path,
                    wanted ? "; new VMs start with it" : "");
        image_close(&image);
        return;
    }
    cleanup_buf struct buf remedy = {0};
    buf_printf(&remedy,
               "build one with %s, or name another with -o image= and its folder with -o images=",
               image_builder(d->settings));
    doctor_find(d, "image", wanted && boots_guests(d) ? DOCTOR_BROKEN : DOCTOR_WARNING, remedy.data,
                "%s", why ? why : name);
}

/* Those of the search path that are not the one new VMs start with, whole or not. */
static void doctor_check_folder(struct doctor *d, const char *path) {
    DIR *dir = opendir(path);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        cleanup_buf struct buf json = {0};
        buf_printf(&json, "%s/%s/image.json", path, entry->d_name);
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, d->settings->config.image) != 0 &&
            !json.failed && access(json.data, F_OK) == 0)
            doctor_check_image(d, entry->d_name, false);
    }
    closedir(dir);
}

void doctor_check_images(struct doctor *d) {
    cleanup_buf struct buf path = {0};
    char *rest = NULL;
    if (d->settings->images_dir && access(d->settings->images_dir, R_OK | X_OK) < 0)
        doctor_find(d, "image", DOCTOR_WARNING, "name the folder that holds folders of images",
                    "-o images=%s: cannot be read, and is passed over", d->settings->images_dir);
    doctor_check_image(d, d->settings->config.image, true);
    image_search_path(d->settings, &path);
    for (char *dir = path.failed ? NULL : strtok_r(path.data, "\n", &rest); dir;
         dir = strtok_r(NULL, "\n", &rest))
        doctor_check_folder(d, dir);
}

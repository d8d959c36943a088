#include <dirent.h>
#include <string.h>

#include "doctor/internal.h"
#include "util/cleanup.h"
#include "vm/image.h"
#include "vmm/host.h"
#include "vmm/vmm.h"

/* What guests are made of: backend, KVM, images. */

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

void doctor_check_kvm(struct doctor *d) {
    static const char virtualize[] = "enable virtualization in the firmware, or nested "
                                     "virtualization where this machine is a guest itself";
    const char *why = "";
    if (host_has_kvm(&why)) {
        doctor_find(d, "kvm", DOCTOR_OK, NULL, "guests run on the CPU itself");
        return;
    }
    const char *comma = strstr(why, ", "); /* what to do about it stands behind */
    bool matters = boots_guests(d);
    doctor_find(d, "kvm", matters ? DOCTOR_WARNING : DOCTOR_OK,
                !matters ? NULL
                : comma  ? comma + 2
                         : virtualize,
                "guests are emulated, several times slower: %.*s",
                (int)(comma ? (size_t)(comma - why) : strlen(why)), why);
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
    doctor_find(d, "image", wanted && boots_guests(d) ? DOCTOR_BROKEN : DOCTOR_WARNING,
                "build one with contrib/guest/tiny, or name another with -o image= and its folder "
                "with -o images=",
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

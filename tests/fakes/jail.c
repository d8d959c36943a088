/* Stands for Firecracker's jailer and for a Firecracker in its jail, where neither can run: a
 * static program that asks of the kernel what the jailer of the releases asks, in its order, and
 * then waits in the jail, as that user, with the command line of a Firecracker.
 *
 *     jail FOLDER UID ID        FOLDER/firecracker is this program
 */

#define _GNU_SOURCE
#include <err.h>
#include <grp.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static void must(int result, const char *what) {
    if (result < 0)
        err(1, "%s", what);
}

static void own_folder(const char *path, uid_t user) {
    mkdir(path, 0700);
    must(chmod(path, 0700), path);
    must(chown(path, user, user), path);
}

static void own_device(const char *path, unsigned major, unsigned minor, uid_t user) {
    must(mknod(path, S_IFCHR | 0600, makedev(major, minor)), path);
    must(chown(path, user, user), path);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        pause();
        return 0;
    }
    uid_t user = (uid_t)atoi(argv[2]);
    must(unshare(CLONE_NEWNS), "unshare");
    must(mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL), "slave");
    must(mount(argv[1], argv[1], NULL, MS_BIND | MS_REC, NULL), "bind");
    must(chdir(argv[1]), "chdir");
    must(mkdir("old_root", 0700), "old_root");
    must((int)syscall(SYS_pivot_root, ".", "old_root"), "pivot_root");
    must(chdir("/"), "/");
    must(umount2("old_root", MNT_DETACH), "umount");
    must(rmdir("old_root"), "rmdir");
    own_folder("/", user);
    own_folder("/dev", user);
    own_folder("/dev/net", user);
    own_device("/dev/net/tun", 10, 200, user);
    own_device("/dev/kvm", 10, 232, user);
    own_device("/dev/urandom", 1, 9, user);
    must(setgroups(0, NULL), "setgroups");
    must(setgid(user), "setgid");
    must(setuid(user), "setuid");
    execl("/firecracker", "/firecracker", "--id", argv[3], "--start-time-us", "1", "--api-sock",
          "/api.sock", "--log-path", "/firecracker.log", NULL);
    err(1, "/firecracker");
}

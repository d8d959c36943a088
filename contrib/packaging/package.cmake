# The Debian package: contrib/deb makes it; or cpack in any build with the prefix /usr.

set(VMSFS_MAINTAINER "vmsfs maintainers <vmsfs@example.org>" CACHE STRING "The package's Maintainer field")

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME vmsfs)
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "virtual machines as directories, by FUSE")
set(CPACK_PACKAGE_DESCRIPTION
"vmsfs is a file system that shows virtual machines as directories. mkdir boots
a machine, its environment variables are files, what is written to its file
exec runs in it, and rmdir destroys it. Shell tools, scripts and configuration
management drive machines without a client or an SDK.
.
It runs machines in QEMU, with KVM where there is one, in Firecracker or in
Cloud Hypervisor, or attaches those that have an SSH server. It can be
mounted by any user, from /etc/fstab, or by systemd.")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_PRE_BUILD_SCRIPTS ${PROJECT_SOURCE_DIR}/contrib/packaging/package-modes.cmake)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_MAINTAINER ${VMSFS_MAINTAINER})
set(CPACK_DEBIAN_PACKAGE_SECTION admin)
set(CPACK_DEBIAN_PACKAGE_PRIORITY optional)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
# fusermount3, ssh-keygen. Machines that are attached need neither QEMU nor an image; making one takes apt.
set(CPACK_DEBIAN_PACKAGE_DEPENDS "fuse3, openssh-client")
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "qemu-system-x86, apt")
set(scripts ${PROJECT_SOURCE_DIR}/contrib/packaging/debian)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${scripts}/common)
file(READ ${scripts}/common COMMON)
foreach(script postinst prerm postrm)
  configure_file(${scripts}/${script} ${PROJECT_BINARY_DIR}/debian/${script} @ONLY)
  list(APPEND CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA ${PROJECT_BINARY_DIR}/debian/${script})
endforeach()
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
include(CPack)

if(NOT SCDOC)
  message(FATAL_ERROR "The package is to have manual pages: install scdoc")
endif()
add_compressed(${PROJECT_BINARY_DIR}/changelog.gz ${PROJECT_SOURCE_DIR}/contrib/packaging/debian/changelog cat)
add_custom_target(changelog ALL DEPENDS ${PROJECT_BINARY_DIR}/changelog.gz)
install(FILES ${PROJECT_BINARY_DIR}/changelog.gz contrib/packaging/debian/copyright DESTINATION ${CMAKE_INSTALL_DOCDIR})

# What the documents say of the sources, as it is where they are installed (install.cmake).

# What is about the sources alone.
/^<!-- sources -->$/,/^<!-- \/sources -->$/d
/contrib\/session\.svg/d
/build-deb/d
s| (\[tests/[^]]*\](tests/[^)]*))||g

# Links, then paths.
s|\[contrib/guest/README\.md\](contrib/guest/README\.md)|[guest-images.md](guest-images.md)|g
s|(contrib/guest/README\.md\(#[^)]*\)\{0,1\})|(guest-images.md\1)|g
s|(vsock_bridge\.c)|(@CMAKE_INSTALL_FULL_DATADIR@/vmsfs/vsock_bridge.c)|g
s|\[LICENSE\](LICENSE)|[copyright](copyright)|g
s#(contrib/\(ansible\|puppet\|salt\)/#(examples/\1/#g
s|contrib/guest/tiny|vmsfs-guest-tiny|g
s|contrib/presets|@CMAKE_INSTALL_FULL_DATADIR@/vmsfs/presets|g
s#contrib/\(ansible\|puppet\|salt\)#@CMAKE_INSTALL_FULL_DOCDIR@/examples/\1#g

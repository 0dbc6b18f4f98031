#!/bin/sh
# Installs what the Go and C++ clients are built with, on Debian 12 and as root. Node.js and npm are expected to be there.
set -eu
export DEBIAN_FRONTEND=noninteractive
# Stubs of protoc-gen-go 1.5 want the protobuf library of the same number, which grpc takes in place of its older one.
packages="g++ golang-go golang-github-golang-protobuf-1-5-dev golang-google-grpc-dev libgrpc++-dev pkg-config
  protobuf-compiler protobuf-compiler-grpc protoc-gen-go-1-5 protoc-gen-go-grpc"
# shellcheck disable=SC2086
dpkg -s $packages > /dev/null 2>&1 && exit 0
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $packages
